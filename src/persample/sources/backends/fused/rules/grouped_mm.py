"""Rows sorted by group, each group with a matrix of its own: `torch.nn.functional.grouped_mm`, experts of a mixture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from persample.sources.backends.fused.linear import LinearProducts
from persample.sources.backends.fused.owners import Owners
from persample.sources.backends.fused.trace import Trace


def grouped_mm(
    trace: Trace,
    mat_a: Tensor,
    mat_b: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Any = None,
    out_dtype: Any = None,
) -> Any:
    """Rows `(S, I)` times matrices `(N, I, O)`: those from `offs[n - 1]` to `offs[n]` times matrix n."""
    if offs is None and bias is None and out_dtype is None:
        return trace.again(torch.bmm, (mat_a, mat_b), {}, {})
    matrices = trace.expression(mat_b)
    if offs is None or matrices is None or mat_a.dim() != 2 or mat_b.dim() != 3:
        return trace.fall_back(torch._grouped_mm, (mat_a, mat_b), {"offs": offs, "bias": bias, "out_dtype": out_dtype})
    layout = trace.layout(mat_a, "grouped_mm")
    _, inputs, outputs = mat_b.shape
    layout.require_features(inputs, outputs)
    result = torch._grouped_mm(mat_a, matrices.value, offs=offs, bias=bias, out_dtype=out_dtype)
    labels = layout.with_features(inputs, 1).labels(mat_a.shape[:1], mat_a.device)
    ends = offs.tolist()

    def contribution(delta: Tensor, a: Tensor) -> GroupedProducts:
        groups = [
            _group(index, labels[start:end], a[start:end], delta[start:end])
            for index, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
            if start < end
        ]
        return GroupedProducts(groups, matrices.value.to(delta.dtype), layout.batch)

    return trace.tap(result, layout.with_features(inputs, outputs), [(mat_b, contribution)], (mat_a,))


def _group(index: int, labels: Tensor, a: Tensor, delta: Tensor) -> Group:
    samples, numbers = labels.unique(return_inverse=True)
    owners = Owners(numbers, len(samples))
    return Group(index, samples, LinearProducts(owners.gather(a.unsqueeze(1)), owners.gather(delta.unsqueeze(1))))


@dataclass(frozen=True)
class Group:
    """The rows of one group.

    Attributes:
        index: which matrix they are multiplied with.
        samples: the samples that have rows in the group, in order, shape `(b,)`.
        products: what they add to g_i of that matrix, for each of these samples.
    """

    index: int
    samples: Tensor
    products: LinearProducts

    def take(self, start: int, stop: int) -> Group:
        """Return the rows of the samples `start` ≤ i < `stop`, renumbered from 0."""
        first, last = (int((self.samples < end).sum()) for end in (start, stop))
        return Group(self.index, self.samples[first:last] - start, self.products.take(slice(first, last)))


@dataclass(frozen=True)
class GroupedProducts:
    """g_i[n] = Σ_l a_l δ_lᵀ over the rows l of sample i that are in group n.

    Attributes:
        groups: the groups that have rows.
        matrices: the operand, of shape `(N, I, O)`.
        batch: B.
    """

    groups: list[Group]
    matrices: Tensor
    batch: int

    def take(self, samples: slice) -> GroupedProducts:
        start, stop, _ = samples.indices(self.batch)
        return GroupedProducts([group.take(start, stop) for group in self.groups], self.matrices, stop - start)

    def per_sample(self) -> Tensor:
        g = self.matrices.new_zeros(self.batch, *self.matrices.shape)
        for group in self.groups:
            g[group.samples, group.index] = group.products.per_sample()
        return g

    def sums(self) -> tuple[Tensor, Tensor]:
        total, squares = torch.zeros_like(self.matrices), torch.zeros_like(self.matrices)
        for group in self.groups:
            total[group.index], squares[group.index] = group.products.sums()
        return total, squares
