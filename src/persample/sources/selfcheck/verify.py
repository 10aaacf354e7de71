"""The self-check: a backend's results, compared with ordinary gradients and a loop over a few samples.

A backend that is silently wrong fails at least one of these comparisons:

- the sum over the samples is the ordinary gradient (finds wrong scalings, unseen uses, forgotten paddings);
- for a few samples, the second moment and the rows are those of the loop (finds folded and transposed layouts);
- a sample's loss stays the same when another sample is exchanged (finds models that mix the samples).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from persample.dtypes import at_least_float32
from persample.errors import RAW_ERRORS, ContractError, DisagreementError, PersampleError, UnsupportedModelError
from persample.moments import Moments
from persample.quantities.computed import Quantities
from persample.sources.batch import Batch
from persample.sources.contract import Contract
from persample.sources.model.random_state import RandomState, random_state, random_state_restored, same_random_state
from persample.sources.model.refusals import mixing
from persample.sources.model.state import state_restored
from persample.sources.selfcheck.oracle import (
    gradient,
    losses_of_part,
    part_gradients,
    require_repeatable,
    sample_gradients,
)
from persample.sources.selfcheck.returned import ADVICE, moments_of, name_of
from persample.sources.selfcheck.tolerances import Allowance, largest_entries, read, tolerance
from persample.sources.selfcheck.verify_quantities import verify_quantities

#: What is checked: moments, losses with per-sample gradients, or quantities.
Result = Moments | tuple[Tensor, dict[str, Tensor]] | Quantities

_SAMPLES = 4  # number of samples that are compared with the loop
_PARTS = 64  # number of parts of a batch that are examined, each alone, to find why a result is wrong


def verify(
    source: Contract,
    batch: Batch,
    result: Result,
    before: RandomState,
    rounding: float = 0.0,
    left: Mapping[str, float] | None = None,
) -> None:
    """Raise if `result`, which `source` computed for `batch`, is wrong.

    Args:
        source: the backend.
        batch: what it was given.
        result: what `compute_moments` or `compute_per_sample` returned, or quantities.
        before: the state of the random numbers before, from which the forward pass is repeated.
        rounding: the relative difference of gradients that is explained otherwise, if it is more than the dtype says.
        left: what `rounding_left` found of gradients that vanish.

    Raises:
        DisagreementError: the result is not what ordinary gradients say.
        UnsupportedModelError: the model or the loss mixes the samples.
    """
    with _of_repeated_passes(source, batch, before):
        with repeating(source, before):
            losses = source.losses(batch)
            total = gradient(losses.sum(), source)
            after = random_state(source.model)
        _verify_no_mixing(source, batch, losses.detach(), before, after, tolerance(losses))
        allowance = Allowance.of(losses, rounding, left)
        if not (source.ordinary_random_stream or same_random_state(before, after)):
            return  # its random numbers are other ones than these, so there is nothing to compare
        with repeating(source, before):
            if isinstance(result, Moments):
                _verify_moments(source, batch, result, losses.detach(), total, before, allowance)
            elif isinstance(result, Quantities):
                few = batch.take(some_samples(batch))
                verify_quantities(source, batch, few, result, losses.detach(), allowance)
            else:
                _verify_rows(source, batch, result, losses.detach(), total, allowance)


def verify_unmixed(source: Contract, batch: Batch, before: RandomState) -> None:
    """Raise if the loss of a sample depends on other samples; forward passes alone tell.

    Raises:
        UnsupportedModelError: the model or the loss mixes the samples.
    """
    with _of_repeated_passes(source, batch, before):
        with repeating(source, before):
            losses = source.losses(batch)
            after = random_state(source.model)
        _verify_no_mixing(source, batch, losses.detach(), before, after, tolerance(losses))


@contextmanager
def _of_repeated_passes(source: Contract, batch: Batch, before: RandomState) -> Iterator[None]:
    """Before reporting a difference, make sure that the forward pass can be repeated."""
    try:
        yield
    except (DisagreementError, UnsupportedModelError):
        require_repeatable(source, batch, before)
        raise


def _verify_no_mixing(
    source: Contract,
    batch: Batch,
    losses: Tensor,
    before: RandomState,
    after: RandomState,
    rounding: float,
) -> None:
    """Require that no sample's loss depends on the others or on their number.

    Where `losses` drew random numbers, from the state `before` to the state `after`, a smaller batch draws others; so
    does another sample, where their count depends on values. But in eval mode there may be none left to draw.
    """
    if batch.size == 1:
        return
    order = _order(batch)
    with repeating(source, before):
        _verify_exchange(source, batch, losses, after, order, rounding)
    if same_random_state(before, after):
        with repeating(source, before):
            _verify_halves(source, batch, losses, order, rounding)
        return
    modules = list(source.model.modules())
    # Only with PyTorch's own layers in eval mode, first: in eval mode many models return something else.
    for quiet in ([m for m in modules if type(m).__module__.startswith("torch.nn.")], modules):
        with repeating(source, before), _in_eval_mode(quiet):
            try:
                losses = source.losses(batch).detach()
            except (PersampleError, *RAW_ERRORS):
                continue  # the model or the loss does not run like that
            if same_random_state(before, random_state(source.model)):
                _verify_exchange(source, batch, losses, before, order, rounding)
                _verify_halves(source, batch, losses, order, rounding)
                return


def _verify_exchange(
    source: Contract, batch: Batch, losses: Tensor, after: RandomState, order: list[int], rounding: float
) -> None:
    first, last = order[0], order[-1]
    rows = [last if i == first else i for i in range(batch.size)]
    others = [i for i in range(batch.size) if i != first]
    with state_restored(source.state()):
        exchanged = source.losses(batch.take(rows)).detach()
    if same_random_state(after, random_state(source.model)):
        _require_unmixed(
            exchanged[others], losses[others], rounding, f"when sample {first} is exchanged for another one"
        )


def _verify_halves(source: Contract, batch: Batch, losses: Tensor, order: list[int], rounding: float) -> None:
    for half in (sorted(order[::2]), sorted(order[1::2])):
        with state_restored(source.state()):
            alone = losses_of_part(source, batch.take(half)).detach()
        _require_unmixed(alone, losses[half], rounding, "in a smaller batch")


@contextmanager
def repeating(source: Contract, before: RandomState) -> Iterator[None]:
    """Start from the random numbers of the call; restore them and the state of the model afterwards."""
    with state_restored(source.state()), random_state_restored(source.model, before):
        yield


@contextmanager
def _in_eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    training = [(module, module.training) for module in modules]
    try:
        for module, _ in training:
            module.training = False
        yield
    finally:
        for module, flag in training:
            module.training = flag


def _require_unmixed(values: Tensor, expected: Tensor, rounding: float, when: str) -> None:
    allowed = rounding * (1 + expected.abs())
    if bool(((values - expected).abs() > allowed).any()):
        raise mixing(f"The losses of other samples change {when}")


def refuse_nonlinear_backward(source: Contract, batch: Batch, before: RandomState) -> None:
    """Raise if the gradient of four times the losses is not four times their gradient.

    Raises:
        UnsupportedModelError: they have.
    """
    with repeating(source, before):
        once = gradient(source.losses(batch).sum(), source)
    with repeating(source, before):
        losses = source.losses(batch)
        scaled = gradient(4 * losses.sum(), source)
    try:
        require_close(source, "gradient", {name: g / 4 for name, g in scaled.items()}, once, Allowance.of(losses))
    except DisagreementError as difference:
        raise UnsupportedModelError(
            "Something in the backward pass (a hook, a custom torch.autograd.Function) clips, normalises or rounds "
            "gradients, or applies another nonlinear function, so the gradient of the batch is not the sum of those "
            "of its samples. Remove it, or make it linear. If you want its effect on each sample alone, use backend "
            "'vjp' with check='never'."
        ) from difference


def refuse_slight_mixing(source: Contract, batch: Batch, before: RandomState) -> None:
    """Raise if ordinary gradients of single losses show that the samples mix, even where the losses hardly change.

    Raises:
        UnsupportedModelError: a sample's loss has another gradient in the batch than alone.
    """
    with repeating(source, before):
        losses = source.losses(batch)
        if not same_random_state(before, random_state(source.model)):
            return
        together, allowance = gradient(losses.sum(), source), Allowance.of(losses)
    few, order, count = some_samples(batch), _order(batch), min(batch.size, _PARTS)
    for i in few:
        with repeating(source, before):
            inside = gradient(source.losses(batch)[i], source)
        with repeating(source, before):
            alone = next(sample_gradients(source, batch, [i])[1])
        _require_same_alone(source, f"sample {i}", inside, alone, allowance)
    with repeating(source, before):
        parts = [order[k::count] for k in range(count)]
        _, of_parts = part_gradients(source, batch, parts, lambda losses: gradient(losses.sum(), source))
        added = {name: torch.zeros_like(g) for name, g in together.items()}
        for part in of_parts:
            for name, g in part.items():
                added[name] += g
    _require_same_alone(source, "the samples, added up,", together, added, allowance, batch.size)


def _require_same_alone(
    source: Contract,
    what: str,
    inside: Mapping[str, Tensor],
    alone: Mapping[str, Tensor],
    allowance: Allowance,
    samples: int = 1,
) -> None:
    try:
        require_close(source, "gradient", inside, alone, allowance, samples)
    except DisagreementError as difference:
        raise UnsupportedModelError(
            f"The gradient of {what} in the batch differs from that alone by more than rounding: the model mixes the "
            "samples slightly (a step size or a scale chosen for the whole batch, an inner solver's tolerance over "
            "all samples), so the gradient of a single sample is not exact. Choose such numbers per sample, or fix "
            "them."
        ) from difference


def _verify_moments(
    source: Contract,
    batch: Batch,
    claimed: Moments,
    losses: Tensor,
    total: Mapping[str, Tensor],
    before: RandomState,
    allowance: Allowance,
) -> None:
    require_close(source, "losses", {"losses": claimed.losses}, {"losses": losses}, allowance, 0)
    require_close(source, "mean gradient", claimed.mean, {n: g / batch.size for n, g in total.items()}, allowance)
    if not source.exact:
        return
    few = batch.take(some_samples(batch))
    state = random_state(source.model)
    # What is done with is not kept: of large models each of these is a model's worth of memory.
    with state_restored(source.state()):
        claimed_root = {name: signed_root(s) for name, s in moments_of(source, few).second_moment.items()}
    root = {name: at_least_float32(torch.zeros_like(g)) for name, g in total.items()}
    with state_restored(source.state()), random_state_restored(source.model, state):
        _, rows = sample_gradients(source, few, range(few.size))
        for row in rows:
            for name, g in row.items():
                root[name].addcmul_(g, g)
    # Compared as root mean squares, in the unit of the gradients, where the tolerance has a meaning.
    for square in root.values():
        square.div_(few.size).sqrt_()
    require_close(source, "second moment", claimed_root, root, allowance)


def _verify_rows(
    source: Contract,
    batch: Batch,
    claimed: tuple[Tensor, dict[str, Tensor]],
    losses: Tensor,
    total: Mapping[str, Tensor],
    allowance: Allowance,
) -> None:
    claimed_losses, gradients = claimed
    require_close(source, "losses", {"losses": claimed_losses}, {"losses": losses}, allowance, 0)
    sums = {name: g.sum(0) for name, g in gradients.items()}
    require_close(source, "sum of the per-sample gradients", sums, total, allowance, batch.size)
    # With random weights, any exchange of rows shows.
    weights = torch.rand(batch.size, device="cpu", generator=torch.Generator().manual_seed(0)).to(losses)
    with repeating(source, random_state(source.model)):
        weighted = gradient((weights * source.losses(batch)).sum(), source)
    found = {name: torch.einsum("b,b...->...", weights.to(g.dtype), g) for name, g in gradients.items()}
    require_close(source, "weighted sum of the per-sample gradients", found, weighted, allowance, batch.size)
    few = some_samples(batch)
    _, rows = sample_gradients(source, batch, few)
    for i, row in zip(few, rows, strict=True):
        claimed_row = {name: g[i] for name, g in gradients.items()}
        require_close(source, f"gradient of sample {i}", claimed_row, row, allowance)


def signed_root(second_moment: Tensor) -> Tensor:
    """Return the square root; entries that are negative by mistake stay negative instead of NaN."""
    return second_moment.abs().sqrt().copysign(second_moment)


def some_samples(batch: Batch) -> list[int]:
    """Return the numbers of the samples that are compared with the loop."""
    return sorted(_order(batch)[:_SAMPLES])


def _order(batch: Batch) -> list[int]:
    generator = torch.Generator().manual_seed(batch.size)
    order: list[int] = torch.randperm(batch.size, device="cpu", generator=generator).tolist()
    return order


def require_close(
    source: Contract,
    what: str,
    claimed: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    allowance: Allowance,
    samples: int = 1,
) -> None:
    """Raise `DisagreementError` unless the claimed value equals the expected one up to rounding.

    Args:
        source: the backend.
        what: how the error names it.
        claimed: tensors by the names of parameters.
        expected: the same, from ordinary gradients.
        allowance: what rounding explains.
        samples: number of gradients that are added up.
    """
    pairs = [(claimed[name], value) for name, value in expected.items()]
    for name, (found, value) in zip(expected, pairs, strict=True):
        _require_same_device(source, f"{what} of {name!r}", found, value)
    nan_elsewhere = read([(found.isnan() != value.isnan()).any() for found, value in pairs])
    sizes, differences = largest_entries(expected.values()), largest_entries(found - value for found, value in pairs)
    for name, wrong, size, difference in zip(expected, nan_elsewhere, sizes, differences, strict=True):
        if wrong:
            _refuse_nan(source, f"{what} of {name!r}", claimed[name], expected[name])
        if difference > allowance.difference(name, size, max(sizes), samples):
            raise DisagreementError(
                f"Backend {name_of(source)} is wrong on this model: the {what} of {name!r} differs from the ordinary "
                f"one by {difference:.3g}, where its largest entry is {size:.3g}. {ADVICE}"
            )


def _require_same_device(source: Contract, what: str, claimed: Tensor, expected: Tensor) -> None:
    if claimed.device != expected.device:
        raise ContractError(
            f"Backend {name_of(source)} returned the {what} on {claimed.device}, expected {expected.device}. {ADVICE}"
        )


def _refuse_nan(source: Contract, what: str, claimed: Tensor, expected: Tensor) -> None:
    """Raise because the two have NaN in different entries."""
    wrong = claimed.isnan() != expected.isnan()
    numbers = "has numbers" if bool(claimed[wrong].isnan().all()) else "is NaN elsewhere"
    raise DisagreementError(
        f"Backend {name_of(source)} is wrong on this model: the {what} is NaN in {int(claimed.isnan().sum())} of "
        f"{claimed.numel()} entries, where the ordinary one {numbers}. {ADVICE}"
    )
