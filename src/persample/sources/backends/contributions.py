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


def samples_at_once(numbers: int, device: torch.device, budget: int = 2**20) -> int:
    """Return how many samples to take at a time, if `numbers` numbers are made of each, and used up.

    On a CPU about `budget` numbers stay in the cache. Elsewhere each operation costs a launch, and must be large to
    keep the processor busy, so there are 2²⁶ of them: 256 MiB in float32.
    """
    if device.type != "cpu":
        budget = 2**26
    return max(1, budget // max(1, numbers))


def squares_of(g: Tensor, dim: int = 0) -> Tensor:
    """Return Σ_i g_i² along the samples, of numbers that are not needed afterwards."""
    if g.is_cuda:
        norms: Tensor = torch.linalg.vector_norm(g, dim=dim)  # reads them once, and writes none
        return norms.square()
    return g.square_().sum(dim)


def precise(values: Tensor) -> Tensor:
    """Return `values` detached and in at least float32, in which all sums are taken; indices stay as they are."""
    values = values.detach()
    return at_least_float32(values) if values.is_floating_point() else values


class Contribution(Protocol):
    """The gradients g_i of one parameter, from one use of it."""

    def take(self, samples: slice) -> Contribution:
        """Return the contribution of some of the samples alone."""

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
        if self.a.shape[-1] == 1:
            # One position: g_i² = (δ_i)² (a_iᵀ)², so that no per-sample gradient is needed (Goodfellow, 2015).
            return self.product(self.delta, self.a), self.product(self.delta.square(), self.a.square())
        total = self.delta.new_zeros(self.shape)
        squares = torch.zeros_like(total)
        rows = samples_at_once(self.shape.numel(), self.delta.device)
        for delta, a in zip(self.delta.split(rows), self.a.split(rows), strict=True):
            g = (delta @ a.mT).reshape(len(a), *self.shape)
            total += g.sum(0)
            squares += squares_of(g)
        return total, squares

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """Return Σ_i Σ_l left_il right_ilᵀ, for factors of the shapes of δ and a."""
        return torch.einsum("bgol,bgil->goi", left, right).reshape(self.shape)


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
        if self.terms.shape[1] == 1:  # the terms are the caller's: they must not be squared in place
            g = self.terms.squeeze(1)
            return g.sum(0), g.square().sum(0)
        g = self.per_sample()
        return g.sum(0), squares_of(g)


def unique_at_most(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `numbers.unique(return_inverse=True)` does, with zeros behind it up to the length of `numbers`.

    So the shape does not depend on the values, for which a GPU would have to be waited for.
    """
    ordered, order = numbers.flatten().sort()
    new = torch.ones_like(ordered)
    new[1:] = ordered[1:] != ordered[:-1]
    place = new.cumsum(0) - 1
    found = torch.zeros_like(ordered).scatter_(0, place, ordered)
    return found, torch.empty_like(place).scatter_(0, order, place).view(numbers.shape)


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
        # Only the rows that a sample looks up are formed: one for each pair (sample, index) that occurs.
        sample = torch.arange(len(self.indices), device=self.indices.device).unsqueeze(1)
        numbers = sample * self.count + self.indices
        pairs, place = unique_at_most(numbers) if numbers.is_cuda else numbers.unique(return_inverse=True)
        g = add_up(place, self.delta, len(pairs))
        index = pairs % self.count
        return add_up(index, g, self.count), add_up(index, g.square(), self.count)


def add_up(index: Tensor, values: Tensor, rows: int) -> Tensor:
    """Return the sums of those `values`, `(…, D)`, that have the same index, as `(rows, D)`."""
    width = values.shape[-1]
    return values.new_zeros(rows, width).index_add_(0, index.reshape(-1), values.reshape(-1, width))
