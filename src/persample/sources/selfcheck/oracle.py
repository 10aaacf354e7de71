"""The oracle: gradients of single samples by definition, for `loop` and the self-check."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from persample.errors import NonFiniteLossError, PersampleError, UnsupportedModelError
from persample.sources.batch import Batch
from persample.sources.contract import Contract
from persample.sources.model.autograd_graph import nodes_behind, variables_of
from persample.sources.model.random_state import RandomState, random_state, random_state_restored, same_random_state
from persample.sources.model.refusals import mixing
from persample.sources.model.state import State, state_restored
from persample.sources.selfcheck.tolerances import tolerance


def sample_gradients(source: Contract, batch: Batch, rows: Iterable[int]) -> tuple[Tensor, Iterator[dict[str, Tensor]]]:
    """Return the losses of `batch` with their graph, and the gradient of each sample in `rows`.

    Raises:
        UnsupportedModelError: the model mixes the samples.
    """
    return part_gradients(source, batch, ([i] for i in rows), lambda losses: gradient(losses.sum(), source))


def part_gradients(
    source: Contract,
    batch: Batch,
    parts: Iterable[list[int]],
    differentiate: Callable[[Tensor], dict[str, Tensor]],
) -> tuple[Tensor, Iterator[dict[str, Tensor]]]:
    """Return the losses of `batch` with their graph, and `differentiate` of the losses of each part.

    Where the forward pass draws no random numbers, each part goes alone through the model. Otherwise a part alone
    would draw others than in the batch, so there the gradients start from the entries of the batch's losses, of a
    forward pass for each part that draws the same numbers. The state of the model (buffers, attributes) is then that
    after one ordinary forward pass over the batch.

    Raises:
        UnsupportedModelError: the model mixes the samples.
    """
    before, state = random_state(source.model), source.state()
    losses = source.losses(batch)
    if same_random_state(before, random_state(source.model)):
        return losses, _gradients_alone(source, batch, losses.detach(), tolerance(losses), parts, differentiate, state)
    return losses, _gradients_in_batch(source, batch, losses, parts, differentiate, state, before)


def _gradients_in_batch(
    source: Contract,
    batch: Batch,
    losses: Tensor,
    parts: Iterable[list[int]],
    differentiate: Callable[[Tensor], dict[str, Tensor]],
    state: State,
    before: RandomState,
) -> Iterator[dict[str, Tensor]]:
    """∇ℓ_i of the losses of the batch, with the random numbers of the pass that gave `losses`.

    Each part has a graph of its own, for a backward pass may change what the next would find there: in deep equilibrium
    models a hook removes itself. Only where the pass cannot be repeated (it draws from a generator that nobody knows)
    all parts share the graph of `losses`.
    """
    after, allowed = source.state(), tolerance(losses)
    for part in parts:
        with state_restored(after), random_state_restored(source.model, before):
            state.put_back()
            again = source.losses(batch)
            same = torch.allclose(again, losses, rtol=allowed, atol=allowed)
            rows = differentiate((again if same else losses)[part])
        yield rows


def _gradients_alone(
    source: Contract,
    batch: Batch,
    losses: Tensor,
    allowed: float,
    parts: Iterable[list[int]],
    differentiate: Callable[[Tensor], dict[str, Tensor]],
    state: State,
) -> Iterator[dict[str, Tensor]]:
    """∇ℓ_i of the model applied to each part alone; losses may differ by the relative error `allowed`.

    Each begins in `state`, that before the pass over the batch.
    """
    after = source.state()
    for part in parts:
        try:
            with state_restored(after):
                state.put_back()
                alone = losses_of_part(source, batch.take(part))
                rows = differentiate(alone)
        except UnsupportedModelError as refusal:
            raise _of_state(source, batch, state, refusal) from refusal
        for i, loss, in_batch in zip(part, alone.tolist(), losses[part].tolist(), strict=True):
            if abs(loss - in_batch) > allowed * (1 + abs(in_batch)):
                others = "alone" if len(part) == 1 else f"among {len(part)} samples"
                what = f"The loss of sample {i} is {in_batch:.6g} in the batch and {loss:.6g} {others}"
                raise _of_state(source, batch, state, mixing(what))
        yield rows


def _of_state(source: Contract, batch: Batch, state: State, refusal: UnsupportedModelError) -> UnsupportedModelError:
    """Return the error for a model that does not run on single samples: `refusal`, or that it keeps a state.

    Args:
        source: the backend.
        batch: the batch.
        state: that before the pass over the batch, after which the model is.
        refusal: what is said otherwise.

    Raises:
        UnsupportedModelError: the forward pass cannot be repeated.
    """
    kept = state.rows_kept(batch.size)
    if kept:
        return UnsupportedModelError(
            f"The model keeps {', '.join(map(repr, kept))} between calls, with an entry for each sample of the batch, "
            "so it cannot run on single samples: reset it before each call, pass it to the model as an argument, or "
            "use backend 'fused', which runs the batch as a whole."
        )
    with state_restored(source.state()):
        state.put_back()
        require_repeatable(source, batch, random_state(source.model))
    return refusal


def require_repeatable(source: Contract, batch: Batch, before: RandomState) -> None:
    """Raise if the forward pass, repeated from the same state and random numbers, gives different losses.

    Raises:
        UnsupportedModelError: it does.
    """
    first, again = (_repeated(source, batch, before) for _ in range(2))
    allowed = tolerance(first)
    if not torch.allclose(first, again, rtol=allowed, atol=allowed):
        raise UnsupportedModelError(
            "The losses of the same batch change when the forward pass is repeated: the model or the loss keeps a "
            "state or a random number generator where it cannot be restored (in an object that is not a module, a "
            "closure or a global variable), so single samples cannot be compared with the batch. Keep it in a buffer "
            "or an attribute of a module, or use check='never' with backend 'fused', which runs the batch once."
        )


def _repeated(source: Contract, batch: Batch, before: RandomState) -> Tensor:
    for parameter in source.parameters().values():
        parameter.grad = None  # what a refused backward pass may have left
    with state_restored(source.state()), random_state_restored(source.model, before):
        return source.losses(batch).detach()


REENTRANT = (
    "The model uses reentrant activation checkpointing, which works with .backward() only: pass use_reentrant=False to "
    "torch.utils.checkpoint.checkpoint."
)


@contextmanager
def reentrant_refused() -> Iterator[None]:
    """Add advice to PyTorch's error that reentrant checkpointing does not support `autograd.grad`."""
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise UnsupportedModelError(REENTRANT) from error


def losses_of_part(source: Contract, part: Batch) -> Tensor:
    """Return the losses of some samples of a batch that the model ran on.

    Raises:
        UnsupportedModelError: the model does not run on these samples without the others.
    """
    try:
        return source.losses(part)
    except NonFiniteLossError as error:
        raise runs_in_batches_only(part.size, error) from error
    except PersampleError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        raise runs_in_batches_only(part.size, error) from error


def runs_in_batches_only(size: int, error: Exception) -> UnsupportedModelError:
    """The refusal of a model that ran on the batch, but raised `error` on `size` of its samples."""
    return UnsupportedModelError(
        f"The model runs on the batch, but not on {size} of its samples alone ({error}): it mixes the samples "
        "(statistics over the batch) or works for one batch size only. Make every sample's loss depend on that "
        "sample alone."
    )


def gradient(loss: Tensor, source: Contract) -> dict[str, Tensor]:
    """Return ∇loss for each parameter of `source`, zeros where the loss does not depend on it.

    Raises:
        UnsupportedModelError: a part of the gradient can be had by `.backward()` only.
    """
    parameters = source.parameters()
    if not parameters or not loss.requires_grad:
        return {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
    wanted = list(parameters.values())
    with reentrant_refused():
        gradients = torch.autograd.grad(loss, wanted + other_leaves(loss, wanted), retain_graph=True, allow_unused=True)
    refuse_accumulated(parameters)
    return {
        name: torch.zeros_like(p, requires_grad=False) if g is None else g.to_dense()
        for (name, p), g in zip(parameters.items(), gradients, strict=False)
    }


def other_leaves(loss: Tensor, parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return the leaves of the graph of `loss` besides `parameters`.

    Autograd runs only what is on the way to the tensors whose gradients it is asked for. With these among them it runs
    what `.backward()` would run: reentrant checkpointing, reversible layers and the like know their parameters by
    other ways than the graph.
    """
    return list(variables_of(nodes_behind(loss)) - set(parameters))


def gradients_at(
    targets: Sequence[Any], losses: Tensor, parameters: Mapping[str, nn.Parameter]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the sum of `losses` at tensors and edges of its graph, None where there are none.

    Raises:
        UnsupportedModelError: the backward pass gives gradients to `parameters` by itself.
    """
    leaves = other_leaves(losses, parameters.values())
    if not losses.requires_grad or not (targets or leaves):
        return (None,) * len(targets)
    gradients = torch.autograd.grad(losses.sum(), [*targets, *leaves], allow_unused=True)
    refuse_accumulated(parameters)
    return gradients[: len(targets)]


def refuse_accumulated(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise if the backward pass that just ended wrote to a parameter's `.grad`."""
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            raise inner_backward_pass(name)


def inner_backward_pass(name: str) -> UnsupportedModelError:
    """The refusal of a parameter whose gradient comes from a nested backward pass."""
    return UnsupportedModelError(
        f"Parameter {name!r} gets its gradient from a backward pass inside the backward pass (a custom "
        "torch.autograd.Function that calls .backward(), as reversible layers do), which gives the sum over the "
        "samples only: replace that by ordinary operations, or freeze the parameter."
    )


def refuse_hidden_uses(source: Contract, batch: Batch) -> None:
    """Raise if custom autograd functions use parameters in ways that the graph does not show.

    Raises:
        UnsupportedModelError: it names the parameter.
    """
    losses = losses_of_part(source, batch)
    if any(isinstance(node, BackwardCFunction) for node in nodes_behind(losses)):
        gradient(losses.sum(), source)
