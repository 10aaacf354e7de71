"""What a linear layer contributes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from persample.kernels.linear import linear_moments, linear_moments_and_norms, linear_squared_norms
from persample.sources.backends.shortcuts import (
    gram,
    gram_of_one_position,
    moments_and_norms,
    numbers_held,
    products_of_pieces,
    scaled,
    squared_norms,
    weighted_sum,
)


@dataclass(frozen=True)
class LinearProducts:
    """g_i = Σ_l δ_il a_ilᵀ: the weight of a linear layer.

    Attributes:
        delta: δ, shape `(B, L, O)`.
        a: the inputs, shape `(B, L, I)`.
    """

    delta: Tensor
    a: Tensor

    def take(self, samples: slice) -> LinearProducts:
        return LinearProducts(self.delta[samples], self.a[samples])

    def per_sample(self) -> Tensor:
        return self.delta.mT @ self.a

    def sums(self) -> tuple[Tensor, Tensor]:
        return linear_moments(self.a, self.delta)


@numbers_held.register
def _(contribution: LinearProducts) -> int:
    return contribution.delta.numel() + contribution.a.numel()


@squared_norms.register
def _(contribution: LinearProducts, size: int, width: int) -> Tensor:
    return linear_squared_norms(contribution.a, contribution.delta)


@moments_and_norms.register
def _(contribution: LinearProducts, size: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return linear_moments_and_norms(contribution.a, contribution.delta)


@weighted_sum.register
def _(contribution: LinearProducts, weights: Tensor, width: int) -> Tensor:
    delta, a = contribution.delta, contribution.a
    # One factor takes the weights, the one by which fewer numbers are copied.
    if delta.numel() + _copied(a) <= a.numel() + _copied(delta):
        delta = _scaled_in_order(delta, weights)
    else:
        a = _scaled_in_order(a, weights)
    return delta.flatten(0, 1).mT @ a.flatten(0, 1)


def _copied(factor: Tensor) -> int:
    """How many numbers are copied to put all positions of all samples into one dimension."""
    samples, positions = factor.shape[:2]
    one_behind_the_other = 1 in (samples, positions) or factor.stride(0) == positions * factor.stride(1)
    return 0 if one_behind_the_other else factor.numel()


def _scaled_in_order(factor: Tensor, weights: Tensor) -> Tensor:
    if _copied(factor) == 0:
        return scaled(factor, weights)
    return factor.clone(memory_format=torch.contiguous_format).mul_(weights.to(factor.dtype).view(-1, 1, 1))


@gram.register
def _(contribution: LinearProducts, size: int, width: int) -> Tensor:
    if contribution.delta.shape[1] == 1:
        return gram_of_one_position(contribution.delta.squeeze(1), contribution.a.squeeze(1))
    return products_of_pieces(contribution, size, width)
