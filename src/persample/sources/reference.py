"""The gradients of single samples by definition: what `loop` returns, and what the self-check compares with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from persample.errors import NonFiniteLossError, PersampleError, UnsupportedModelError
from persample.sources.tolerances import tolerance
from persample.sources.untouched import buffers_restored, random_state, same_random_state

if TYPE_CHECKING:
    from persample.sources.base import PerSampleGradSource
    from persample.sources.batch import Batch


def sample_gradients(
    source: PerSampleGradSource, batch: Batch, rows: Iterable[int]
) -> tuple[Tensor, Iterator[dict[str, Tensor]]]:
    """Return the losses of `batch` with their graph, and for each of `rows` the gradient of that sample.

    Where the forward pass draws no random numbers, each sample goes alone through the model. Otherwise a sample
    alone would draw others than in the batch, so there the gradients start from the entries of the batch's losses.
    The buffers of the model are left as they are.

    Raises:
        UnsupportedModelError: the model mixes the samples.
    """
    before = random_state(source.model)
    with buffers_restored(source.model):
        losses = source.losses(batch)
    if same_random_state(before, random_state(source.model)):
        return losses, _gradients_alone(source, batch, losses.detach(), tolerance(losses), rows)
    return losses, _gradients_in_batch(source, losses, rows)


def _gradients_alone(
    source: PerSampleGradSource, batch: Batch, losses: Tensor, allowed: float, rows: Iterable[int]
) -> Iterator[dict[str, Tensor]]:
    """∇ℓ_i of the model applied to sample i alone, whose loss may be another one by the relative error `allowed`."""
    for i in rows:
        with buffers_restored(source.model):
            alone = losses_of_part(source, batch.rows([i]))[0]
            row = gradient(alone, source)
        if abs(alone.item() - losses[i].item()) > allowed * (1 + abs(losses[i].item())):
            raise UnsupportedModelError(
                f"The loss of sample {i} is {losses[i].item():.6g} in the batch and {alone.item():.6g} alone: the "
                "model or the loss mixes the samples (statistics over the batch, a softmax over dim 0, a division "
                "by the batch size, an inner layout that is not batch-first), so the gradient of a single sample "
                "does not exist. Make every sample's loss depend on that sample alone."
            )
        yield row


REENTRANT = (
    "The model uses reentrant activation checkpointing, which works with .backward() only: pass use_reentrant=False to "
    "torch.utils.checkpoint.checkpoint."
)


@contextmanager
def reentrant_refused() -> Iterator[None]:
    """Say what to do where PyTorch says that reentrant checkpointing has no `autograd.grad`."""
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise UnsupportedModelError(REENTRANT) from error


def losses_of_part(source: PerSampleGradSource, part: Batch) -> Tensor:
    """Return the losses of some samples of a batch on which the model ran.

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
        f"The model runs on the batch, but not on {size} of its samples by themselves ({error}): it mixes the samples "
        "(statistics over the batch) or is written for one batch size. Make every sample's loss depend on that sample "
        "alone."
    )


def _gradients_in_batch(
    source: PerSampleGradSource, losses: Tensor, rows: Iterable[int]
) -> Iterator[dict[str, Tensor]]:
    """∇ℓ_i from entry i of the batch's losses, which share the random numbers of one forward pass."""
    for i in rows:
        yield gradient(losses[i], source)


def gradient(loss: Tensor, source: PerSampleGradSource) -> dict[str, Tensor]:
    """Return ∇loss for each parameter of `source`, zeros where the loss does not depend on it."""
    parameters = source.parameters()
    if not parameters or not loss.requires_grad:
        return {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
    with reentrant_refused():
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(p, requires_grad=False) if g is None else g.to_dense()
        for (name, p), g in zip(parameters.items(), gradients, strict=True)
    }
