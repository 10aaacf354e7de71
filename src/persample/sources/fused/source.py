"""The project's own engine: mean gradient and exact second moment inside one ordinary backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from persample.errors import UnsupportedModelError
from persample.moments import Moments
from persample.sources.base import Check, PerSampleGradSource
from persample.sources.batch import Batch
from persample.sources.fused.capture import Capture
from persample.sources.fused.choice import deterministic_choice
from persample.sources.fused.uses import Moment, Rows
from persample.sources.reference import reentrant_refused


class FusedSource(PerSampleGradSource):
    """Per-sample gradients by capturing the operations that use parameters.

    Args:
        model: the network.
        loss_fn: the loss of each sample.
        deterministic: fix the form of each product, so that results repeat bit for bit; otherwise the fastest is
            found by timing each once for each shape.
        check: when the self-check runs, see `PerSampleGradSource`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Any],
        *,
        deterministic: bool = False,
        check: Check = "first",
    ) -> None:
        super().__init__(model, loss_fn, check=check)
        self.deterministic = deterministic

    def compute_per_sample(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        sink = Rows(self.parameters(), batch.size)
        losses = self._backward(batch, sink)
        return losses, self._in_own_dtype(sink.gradients)

    def compute_moments(self, batch: Batch) -> Moments:
        sink = Moment(self.parameters(), batch.size)
        losses = self._backward(batch, sink)
        return Moments(
            losses=losses,
            mean=self._in_own_dtype({name: value.div_(batch.size) for name, value in sink.total.items()}),
            second_moment=self._in_own_dtype({name: value.div_(batch.size) for name, value in sink.squares.items()}),
        )

    def _backward(self, batch: Batch, sink: Moment | Rows) -> Tensor:
        parameters = self.parameters()
        capture = Capture(parameters, batch.size, sink)
        leaves = pytree.tree_leaves((batch.args, dict(batch.kwargs), batch.targets))
        capture.follow(leaf for leaf in leaves if isinstance(leaf, Tensor))
        with deterministic_choice(self.deterministic):
            with capture:
                losses = self.losses(batch)
            if losses.requires_grad:
                total = losses.sum()
                with capture.during_backward():
                    self._run_backward(total, capture, parameters)
            with torch.autocast(losses.device.type, enabled=False):
                sink.finish()
        return losses.detach()

    def _run_backward(self, total: Tensor, capture: Capture, parameters: dict[str, nn.Parameter]) -> None:
        # The anchor makes every tap part of the graph; parameters are among the inputs so that an unseen use shows.
        with reentrant_refused():
            _, *unseen = torch.autograd.grad(total, [capture.anchor, *parameters.values()], allow_unused=True)
        for name, gradient in zip(parameters, unseen, strict=True):
            if gradient is not None:
                raise UnsupportedModelError(
                    f"Parameter {name!r} is used by an operation that backend 'fused' cannot see (a custom "
                    "torch.autograd.Function, or compiled code): use backend 'vmap' or 'loop'."
                )

    def _in_own_dtype(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: values[name].to(p.dtype) for name, p in self.parameters().items()}
