"""The contribution of an operand that was computed from parameters and has separate entries for each sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from persample.sources.backends.fused.axis import Axis


@dataclass(frozen=True)
class OwnRows:
    """g_i is t_i in the entries of sample i, and zero in all others.

    Attributes:
        terms: t, of b samples: `(b, *shape of the operand in a batch of one)`.
        axis: where the operand has its entries for the samples.
        count: B, the number of samples that the operand has entries for.
        first: which of them is the first of these b.
    """

    terms: Tensor
    axis: Axis
    count: int
    first: int = 0

    def take(self, samples: slice) -> OwnRows:
        start, _, _ = samples.indices(len(self.terms))
        return OwnRows(self.terms[samples], self.axis, self.count, self.first + start)

    def per_sample(self) -> Tensor:
        each = torch.arange(len(self.terms), device=self.terms.device)
        g = self.terms.new_zeros(len(self.terms), self.count, *self.terms.shape[1:])
        g[each, self.first + each] = self.terms
        return torch.stack([self.axis.put_back(parts) for parts in g])

    def sums(self) -> tuple[Tensor, Tensor]:
        total = self.terms.new_zeros(self.count, *self.terms.shape[1:])
        total[self.first : self.first + len(self.terms)] = self.terms
        total = self.axis.put_back(total)
        return total, total.square()


@dataclass(frozen=True)
class PickedRows:
    """The same for rows that were selected or sorted.

    Attributes:
        delta: δ of the operand.
        labels: whose each of its entries is.
        samples: the samples that are asked for.
    """

    delta: Tensor
    labels: Tensor
    samples: Tensor

    def take(self, samples: slice) -> PickedRows:
        return PickedRows(self.delta, self.labels, self.samples[samples])

    def per_sample(self) -> Tensor:
        own = self.labels == self.samples.view(-1, *[1] * self.delta.dim())
        return torch.where(own, self.delta, 0)

    def sums(self) -> tuple[Tensor, Tensor]:
        return self.delta.clone(), self.delta.square()  # δ may be that of other parameters, too
