"""y_l = E[v_l]: row v of g_i is the sum of δ over the positions of sample i that hold v."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from persample.errors import UnsupportedModelError
from persample.sources.backends.contributions import Lookups
from persample.sources.backends.fused.trace import Trace


def embedding(
    trace: Trace,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """`F.embedding`."""
    _refuse("F.embedding", max_norm, scale_grad_by_freq)
    layout = trace.layout(input, "F.embedding")
    count, width = weight.shape
    after = layout.with_features(1, width)
    result = F.embedding(input, trace.value(weight), padding_idx)

    def contribution(delta: Tensor, indices: Tensor) -> Lookups:
        v = layout.sample_first(indices, 1).squeeze(-1).long()
        d = after.sample_first(delta, width)
        if padding_idx is not None:
            # The row of the padding index gets no gradient.
            d = d * (v != padding_idx % count).unsqueeze(-1)
        return Lookups(v, d, count)

    return trace.tap(result, after, [(weight, contribution)], (input,))


def embedding_bag(
    trace: Trace,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """`F.embedding_bag`: an embedding whose rows are reduced bag by bag."""
    _refuse("F.embedding_bag", max_norm, scale_grad_by_freq)
    with trace:
        rows = F.embedding(input, weight)
        if per_sample_weights is not None:
            rows = rows * per_sample_weights.unsqueeze(-1)
        held = torch.ones_like(input, dtype=torch.bool)
        if padding_idx is not None:
            held = input != padding_idx % len(weight)
            rows = rows.masked_fill(~held.unsqueeze(-1), -torch.inf if mode == "max" else 0.0)
        if offsets is None:
            if mode == "max":
                return _without_infinity(rows.max(1).values)
            total = rows.sum(1)
            return total if mode == "sum" else total / held.sum(1).clamp(min=1).unsqueeze(-1)
        starts = (offsets[:-1] if include_last_offset else offsets).detach()
        bag = torch.bucketize(torch.arange(len(input), device=input.device), starts, right=True) - 1
        empty = rows.new_zeros(len(starts), rows.shape[1])
        if mode == "max":
            index = bag.unsqueeze(-1).expand_as(rows)
            return _without_infinity(empty.scatter_reduce(0, index, rows, "amax", include_self=False))
        total = empty.index_add(0, bag, rows)
        if mode == "sum":
            return total
        count = torch.zeros(len(starts), dtype=torch.long, device=bag.device).index_add(0, bag, held.long())
        return total / count.clamp(min=1).unsqueeze(-1)


def _without_infinity(largest: Tensor) -> Tensor:
    """The largest entry of a bag of padding alone is zero."""
    return largest.masked_fill(largest == -torch.inf, 0.0)


def _refuse(name: str, max_norm: float | None, scale_grad_by_freq: bool) -> None:
    if max_norm is not None or scale_grad_by_freq:
        raise UnsupportedModelError(
            f"{name} was called with max_norm or scale_grad_by_freq: the first rewrites the weight, the second mixes "
            "the samples. Do not pass them."
        )
