"""The self-check: what a backend claims, compared with ordinary gradients and with a loop over a few samples.

A backend that is silently wrong fails at least one of these comparisons:

- the sum over the samples is the ordinary gradient (finds wrong scalings, unseen uses, forgotten paddings);
- for a few samples, the second moment and the rows are those of the loop (finds folded and transposed layouts);
- a sample's loss stays the same when another sample is exchanged (finds models that mix the samples).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from persample.errors import DisagreementError, UnsupportedModelError
from persample.moments import Moments
from persample.sources.batch import Batch, take_rows
from persample.sources.reference import gradient, losses_of_part, sample_gradients
from persample.sources.tolerances import tolerance
from persample.sources.untouched import (
    RandomState,
    buffers_restored,
    random_state,
    random_state_restored,
    same_random_state,
)

if TYPE_CHECKING:
    from persample.sources.base import PerSampleGradSource

_SAMPLES = 3  # as many samples as are compared with the loop


def verify(
    source: PerSampleGradSource,
    batch: Batch,
    result: Moments | tuple[Tensor, dict[str, Tensor]],
    before: RandomState,
) -> None:
    """Raise if `result`, which `source` computed for `batch`, is wrong.

    Args:
        source: the backend.
        batch: what it was given.
        result: what `compute_moments` or `compute_per_sample` returned.
        before: the state of the random numbers before, from which the forward pass is repeated.

    Raises:
        DisagreementError: the result is not what ordinary gradients say.
        UnsupportedModelError: the model or the loss mixes the samples.
    """
    with buffers_restored(source.model), random_state_restored(source.model, before):
        losses = source.losses(batch)
        total = gradient(losses.sum(), source)
        random = not same_random_state(before, random_state(source.model))
    _verify_no_mixing(source, batch, losses.detach(), before, random)
    if random and not source.ordinary_random_stream:
        return  # its random numbers are other ones than these, so there is nothing to compare
    with buffers_restored(source.model), random_state_restored(source.model, before):
        if isinstance(result, Moments):
            _verify_moments(source, batch, result, losses.detach(), total, before)
        else:
            _verify_rows(source, batch, result, losses.detach(), total)


def _verify_no_mixing(
    source: PerSampleGradSource, batch: Batch, losses: Tensor, before: RandomState, random: bool
) -> None:
    if batch.size == 1:
        return
    last = batch.size - 1
    exchanged = batch.rows([last, *range(1, batch.size)])
    with torch.no_grad(), buffers_restored(source.model), random_state_restored(source.model, before):
        others = source.losses(exchanged)[1:]
    _require_unmixed(others, losses[1:], "when sample 0 is exchanged for another one")
    few = slice(0, min(_SAMPLES, last))
    with torch.no_grad(), buffers_restored(source.model), random_state_restored(source.model, before):
        if not random:
            _require_unmixed(losses_of_part(source, batch.rows(few)), losses[few], "in a smaller batch")
        else:
            # A smaller batch would draw other random numbers, but the loss alone can be given fewer rows.
            outputs = source.model(*batch.args, **batch.kwargs)
            if all(len(leaf) == batch.size for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)):
                fewer = source.loss_fn(take_rows(outputs, few), take_rows(batch.targets, few))
                _require_unmixed(fewer, losses[few], "in a smaller batch")


def _require_unmixed(values: Tensor, expected: Tensor, when: str) -> None:
    allowed = tolerance(expected) * (1 + expected.abs())
    if bool(((values - expected).abs() > allowed).any()):
        raise UnsupportedModelError(
            f"The losses of other samples change {when}: the model or the loss mixes the samples (statistics over "
            "the batch, a softmax over dim 0, a division by the batch size, an inner layout that is not batch-first), "
            "so the gradient of a single sample does not exist. Make every sample's loss depend on that sample alone."
        )


def _verify_moments(
    source: PerSampleGradSource,
    batch: Batch,
    claimed: Moments,
    losses: Tensor,
    total: Mapping[str, Tensor],
    before: RandomState,
) -> None:
    _require_close(source, "losses", {"losses": claimed.losses}, {"losses": losses})
    mean = {name: g / batch.size for name, g in total.items()}
    _require_close(source, "mean gradient", claimed.mean, mean, _largest(losses))
    if not source.exact:
        return
    few = batch.rows(slice(0, _SAMPLES))
    state = random_state(source.model)
    with buffers_restored(source.model):
        claimed_few = source.compute_moments(few)
    with buffers_restored(source.model), random_state_restored(source.model, state):
        _, rows = sample_gradients(source, few, range(few.size))
        gradients = list(rows)
    # Compared as root mean squares, in the unit of the gradients, where the tolerance has a meaning.
    root = {name: torch.stack([g[name] for g in gradients]).square().mean(0).sqrt() for name in total}
    claimed_root = {name: s.sqrt() for name, s in claimed_few.second_moment.items()}
    _require_close(source, "second moment", claimed_root, root, _largest(losses))


def _verify_rows(
    source: PerSampleGradSource,
    batch: Batch,
    claimed: tuple[Tensor, dict[str, Tensor]],
    losses: Tensor,
    total: Mapping[str, Tensor],
) -> None:
    claimed_losses, gradients = claimed
    _require_close(source, "losses", {"losses": claimed_losses}, {"losses": losses})
    for name, p in source.parameters().items():
        shape = tuple(gradients[name].shape) if name in gradients else None
        if shape != (batch.size, *p.shape):
            raise DisagreementError(
                f"Backend {_name(source)} returned shape {shape} for parameter {name!r}, but "
                f"{batch.size} samples of shape {tuple(p.shape)} were due. {_ADVICE}"
            )
    sums = {name: g.sum(0) for name, g in gradients.items()}
    _require_close(source, "sum of the per-sample gradients", sums, total, len(losses) * _largest(losses))
    few = sorted({0, batch.size // 2, batch.size - 1})
    _, rows = sample_gradients(source, batch, few)
    for i, row in zip(few, rows, strict=True):
        claimed_row = {name: g[i] for name, g in gradients.items()}
        _require_close(source, f"gradient of sample {i}", claimed_row, row, _largest(losses))


_ADVICE = (
    "Use another backend for this model ('vmap' runs the largest number of models exactly, 'loop' all of them), and "
    "please report it with the model's code."
)


def _name(source: PerSampleGradSource) -> str:
    return type(source).__name__


def _require_close(
    source: PerSampleGradSource,
    what: str,
    claimed: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    largest_loss: float = 0.0,
) -> None:
    if claimed.keys() != expected.keys():
        missing = sorted(expected.keys() ^ claimed.keys())
        raise DisagreementError(
            f"Backend {_name(source)} returned a {what} for other parameters than the model's: {', '.join(missing)}. "
            f"{_ADVICE}"
        )
    largest = max((_largest(e) for e in expected.values()), default=0.0)
    for name, value in expected.items():
        allowed = tolerance(value) * _largest(value)
        # Gradients that vanish in exact arithmetic (a bias before a normalisation) consist of rounding alone.
        allowed += 1e-2 * tolerance(value) * largest + 1e-4 * tolerance(value) * largest_loss
        difference = _largest(claimed[name] - value)
        if not difference <= allowed and not torch.equal(claimed[name].isnan(), value.isnan()):
            difference = float("inf")
        if difference > allowed:
            raise DisagreementError(
                f"Backend {_name(source)} is wrong on this model: the {what} of {name!r} differs from the ordinary "
                f"one by {difference:.3g}, where its largest entry is {_largest(value):.3g}. {_ADVICE}"
            )


def _largest(values: Tensor) -> float:
    return values.abs().nan_to_num(nan=0.0).max().item() if values.numel() else 0.0
