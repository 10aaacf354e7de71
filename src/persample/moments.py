"""What a source returns: the mean gradient and the mean squared gradient of the single samples of a mini-batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from persample.errors import UsageError


@dataclass(frozen=True)
class Moments:
    """First and second moment of the per-sample gradients of one mini-batch of B samples.

    With g_i the gradient of the loss of sample i alone, no 1/B anywhere in g_i:

    Attributes:
        losses: the B losses, detached, shape `(B,)`.
        mean: Σ_i g_i / B for each parameter, keyed by its name in `model.named_parameters()`.
        second_moment: Σ_i g_i² / B (element by element), with the same keys and shapes.
    """

    losses: Tensor
    mean: Mapping[str, Tensor]
    second_moment: Mapping[str, Tensor]

    @property
    def batch_size(self) -> int:
        """The number of samples B that the moments are averaged over."""
        return len(self.losses)


def merge_moments(parts: Iterable[Moments]) -> Moments:
    """Return the moments of all samples of `parts` together: micro-batches of one batch, or draws of the weights.

    A part of B_k samples has the weight B_k / Σ_k B_k, so micro-batches of different sizes give exactly what the
    whole batch would have given.

    Raises:
        UsageError: there is no part, or the parts belong to different parameters.
    """
    parts = list(parts)
    if not parts:
        raise UsageError("merge_moments() was given no moments: pass at least one Moments object.")
    names = parts[0].mean.keys()
    for part in parts[1:]:
        if part.mean.keys() != names:
            other = sorted(names ^ part.mean.keys())
            raise UsageError(
                f"merge_moments() was given moments of different parameters (only in some: {', '.join(other)}): "
                "merge only what comes from the same model."
            )
    size = sum(part.batch_size for part in parts)
    weights = [part.batch_size / size for part in parts]
    return Moments(
        losses=torch.cat([part.losses for part in parts]),
        mean=_weighted_sums([part.mean for part in parts], weights),
        second_moment=_weighted_sums([part.second_moment for part in parts], weights),
    )


def _weighted_sums(parts: list[Mapping[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    sums = {}
    for name, first in parts[0].items():
        total = weights[0] * first
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            total.add_(part[name], alpha=weight)
        sums[name] = total
    return sums
