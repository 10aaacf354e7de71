"""What one use of a parameter adds to its per-sample gradients, and the sums of their squares.

Index legend: B samples, G groups, L positions in a sample (of a sequence, or output pixels of a convolution),
I inputs and O outputs of a group. The gradient of sample i is always a sum over its L positions, taken **before**
squaring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from persample.dtypes import at_least_float32
from persample.kernels.lookups import lookup_moments
from persample.kernels.outer import outer_moments
from persample.kernels.terms import term_moments


def precise(values: Tensor) -> Tensor:
    """Return `values` detached and in at least float32, the dtype of all sums; indices keep theirs."""
    values = values.detach()
    return at_least_float32(values) if values.is_floating_point() else values


class Contribution(Protocol):
    """The gradients g_i of one parameter, from one use of it."""

    def take(self, samples: slice) -> Contribution:
        """Return the contribution of a subset of the samples."""

    def per_sample(self) -> Tensor:
        """Return g_i for each sample, shape `(B, *parameter.shape)`."""

    def sums(self) -> tuple[Tensor, Tensor]:
        """Return Σ_i g_i and Σ_i g_i², each of the parameter's shape."""


@dataclass(frozen=True)
class OuterProducts:
    """g_i = Σ_l δ_il a_ilᵀ in each group: the weight of a linear layer or convolution.

    Attributes:
        delta: δ, shape `(B, G, O, L)`.
        a: the (unfolded) inputs [[a]], shape `(B, G, I, L)`.
        shape: shape of the parameter; it has G·O·I entries in this order.
    """

    delta: Tensor
    a: Tensor
    shape: torch.Size

    def take(self, samples: slice) -> OuterProducts:
        return OuterProducts(self.delta[samples], self.a[samples], self.shape)

    def per_sample(self) -> Tensor:
        return (self.delta @ self.a.mT).reshape(len(self.a), *self.shape)

    def sums(self) -> tuple[Tensor, Tensor]:
        total, squares = outer_moments(self.delta, self.a)
        return total.view(self.shape), squares.view(self.shape)


@dataclass(frozen=True)
class Terms:
    """g_i = Σ_l t_il: biases (t = δ) and the scales of normalisations (t = δ ∘ x̂).

    Attributes:
        terms: t, shape `(B, L, *parameter.shape)`.
    """

    terms: Tensor

    def take(self, samples: slice) -> Terms:
        return Terms(self.terms[samples])

    def per_sample(self) -> Tensor:
        return self.terms.sum(1)

    def sums(self) -> tuple[Tensor, Tensor]:
        return term_moments(self.terms)


@dataclass(frozen=True)
class Lookups:
    """g_i[v] = Σ_l δ_il over the positions l of sample i that hold index v: the table of an embedding.

    Attributes:
        indices: shape `(B, L)`.
        delta: δ, shape `(B, L, D)`, zero where the padding index stands.
        count: number of rows V of the table, which has shape `(V, D)`.
    """

    indices: Tensor
    delta: Tensor
    count: int

    def take(self, samples: slice) -> Lookups:
        return Lookups(self.indices[samples], self.delta[samples], self.count)

    def per_sample(self) -> Tensor:
        samples, _, width = self.delta.shape
        index = self.indices.unsqueeze(-1).expand_as(self.delta)
        return self.delta.new_zeros(samples, self.count, width).scatter_add_(1, index, self.delta)

    def sums(self) -> tuple[Tensor, Tensor]:
        return lookup_moments(self.indices, self.delta, self.count)
