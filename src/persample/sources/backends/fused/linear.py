"""What a linear layer contributes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from persample.kernels.linear import (
    linear_moments,
    linear_moments_and_norms,
    linear_squared_norms,
    linear_weighted_sum,
)
from persample.sources.backends.shortcuts import (
    gram,
    gram_of_one_position,
    moments_and_norms,
    numbers_held,
    products_of_pieces,
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
    return linear_weighted_sum(contribution.a, contribution.delta, weights)


@gram.register
def _(contribution: LinearProducts, size: int, width: int) -> Tensor:
    if contribution.delta.shape[1] == 1:
        return gram_of_one_position(contribution.delta.squeeze(1), contribution.a.squeeze(1))
    return products_of_pieces(contribution, size, width)
