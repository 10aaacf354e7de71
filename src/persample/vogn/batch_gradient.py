"""The ordinary gradient of a batch, for the rules that need no gradients of single samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from persample.losses import as_per_sample
from persample.moments import Moments
from persample.sources.batch import as_batch
from persample.sources.model.batch_norm_nodes import read_right
from persample.sources.model.calling import called, losses_of
from persample.sources.model.isolation import untouched
from persample.sources.recording.forward_pass import ForwardPass
from persample.sources.recording.recorder import Recorder
from persample.sources.recording.results import LossReduction, Recorded, Sums


class BatchGradient:
    """Gives `Moments` without second moments, by one ordinary backward pass.

    Samples may be mixed (BatchNorm in training mode): only the gradient of the whole batch is asked for.

    Args:
        model: the network. Neither it nor its parameters are changed.
        loss_fn: the loss of each sample, as for `persample.make_source`.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any, Any], Any]) -> None:
        self.model = model
        self.loss_fn = as_per_sample(loss_fn)

    def moments(self, inputs: Any, targets: Any) -> Moments:
        """Return losses and mean gradient, and no second moment.

        Arguments and keys are those of `PerSampleGradSource.moments`.

        Raises:
            BatchError: inputs and targets are not a mini-batch.
            LossError: the loss is not a finite vector of length B.
        """
        batch = as_batch(inputs, targets, self.model)
        params = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        with untouched(self.model), torch.enable_grad():
            args, kwargs, targets = batch.for_a_call()
            losses = losses_of(self.loss_fn, called(self.model, args, kwargs), targets, batch.size)
            read_right([losses])
            gradients: tuple[Tensor | None, ...] = (None,) * len(params)
            if params and losses.requires_grad:
                gradients = torch.autograd.grad(losses.mean(), list(params.values()), allow_unused=True)
        mean = {
            name: torch.zeros_like(p, requires_grad=False) if g is None else g.to_dense()
            for (name, p), g in zip(params.items(), gradients, strict=True)
        }
        return Moments(losses.detach(), mean, {})

    @contextmanager
    def recording(self, loss_reduction: LossReduction = "mean") -> Iterator[Recorded]:
        """Record forward and backward passes of the user, as `PerSampleGradSource.recording` does."""
        params = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        with GradientRecorder(self.model, params, loss_reduction) as recorder:
            yield recorder.recorded


class GradientRecorder(Recorder):
    """Records the ordinary gradients of the user's backward passes."""

    def before_backward(self, losses: Sequence[Tensor]) -> AbstractContextManager[Any]:
        return self.with_gradients()

    def after_backward(self, forward_pass: ForwardPass) -> Sums:
        return Sums(forward_pass.batch.size, self.gradients, None)

    def left_out(self) -> Iterable[str]:
        return self.gradients
