"""What a convolution contributes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from persample.kernels.convolution import (
    convolution_moments,
    convolution_moments_and_norms,
    convolution_per_sample,
    convolution_squared_norms,
)
from persample.kernels.convolution_forms import weight_gradient
from persample.kernels.images import Images, arguments
from persample.sources.backends.shortcuts import moments_and_norms, numbers_held, scaled, squared_norms, weighted_sum


@dataclass(frozen=True)
class Convolution(Images):
    """g_i = Σ_l δ_il [[x]]_ilᵀ: the weight of a convolution."""

    def per_sample(self) -> Tensor:
        return convolution_per_sample(*arguments(self))

    def sums(self) -> tuple[Tensor, Tensor]:
        return convolution_moments(*arguments(self))


@numbers_held.register
def _(contribution: Convolution) -> int:
    return contribution.delta.numel() + contribution.x.numel()


@moments_and_norms.register
def _(contribution: Convolution, size: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return convolution_moments_and_norms(*arguments(contribution))


@squared_norms.register
def _(contribution: Convolution, size: int, width: int) -> Tensor:
    return convolution_squared_norms(*arguments(contribution))


@weighted_sum.register
def _(contribution: Convolution, weights: Tensor, width: int) -> Tensor:
    delta = scaled(contribution.delta, weights.repeat_interleave(contribution.images))
    return weight_gradient(delta, contribution.x, contribution.geometry)
