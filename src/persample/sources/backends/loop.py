"""Backend `"loop"`: one backward pass for each sample. Slow and obvious: the oracle for all others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from persample.moments import Moments
from persample.sources.batch import Batch
from persample.sources.selfcheck.oracle import sample_gradients
from persample.sources.source import PerSampleGradSource


class LoopSource(PerSampleGradSource):
    """The gradient of one sample after the other.

    Each sample goes alone through the model, which gives its gradient by definition; its loss must be the one that
    it has in the batch, or else the model mixes the samples, which is refused. Models that draw random numbers
    (dropout) get one backward pass for each entry of the batch's losses instead.
    """

    method: ClassVar[str] = "one backward pass for each sample"

    runs_parameter_hooks: ClassVar[bool] = True

    ordinary_state = True

    def compute_per_sample(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        losses, rows = self._gradients(batch)
        gradients = {name: p.new_zeros((batch.size, *p.shape)) for name, p in self.parameters().items()}
        for i, row in enumerate(rows):
            for name, gradient in row.items():
                gradients[name][i] = gradient
        return losses, gradients

    def compute_moments(self, batch: Batch) -> Moments:
        losses, rows = self._gradients(batch)
        mean = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.parameters().items()}
        second_moment = {name: torch.zeros_like(total) for name, total in mean.items()}
        for row in rows:
            for name, gradient in row.items():
                mean[name] += gradient / batch.size
                second_moment[name] += gradient.square() / batch.size
        return Moments(losses, mean, second_moment)

    def _gradients(self, batch: Batch) -> tuple[Tensor, Iterator[dict[str, Tensor]]]:
        losses, rows = sample_gradients(self, batch, range(batch.size))
        return losses.detach(), rows
