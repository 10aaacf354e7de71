"""Convolutions of one, two and three dimensions, and transposed ones, with stride, padding, dilation and groups.

With the padded and unfolded input [[x]], `(B, G, C/G·K, L)`, a convolution is a matrix product at each of its L output
positions: g_i = Σ_l δ_il [[x]]_ilᵀ. A transposed convolution is the adjoint of the convolution with the same weight:
there δ is unfolded, and x takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from persample.errors import UnsupportedModelError
from persample.kernels.images import Geometry
from persample.kernels.unfolding import padding_pairs, unfold
from persample.sources.backends.contributions import OuterProducts, Terms
from persample.sources.backends.fused.convolution import Convolution
from persample.sources.backends.fused.layout import Layout
from persample.sources.backends.fused.trace import Trace
from persample.sources.model.refusals import VMAP_OR_VJP


def _convolution(function: Callable[..., Tensor], dimensions: int) -> Callable[..., Tensor]:
    def rule(
        trace: Trace,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        name = f"F.conv{dimensions}d"
        rows, after = _layout(trace, name, input, dimensions)
        kernel = tuple(weight.shape[2:])
        strides, dilations = _each(stride, dimensions), _each(dilation, dimensions)
        sizes = padding if isinstance(padding, str) else _each(padding, dimensions)
        pairs = padding_pairs(sizes, kernel, dilations)
        if set(kernel) == {1} and set(strides) != {1} and not any(map(any, pairs)) and input.is_contiguous():
            # A pointwise convolution that jumps is one without jumps on every so many-th pixel, and cheaper so. Were
            # the channels last in memory, the result might lie otherwise.
            jumps = tuple(slice(None, None, s) for s in strides)
            input = input[(slice(None), slice(None), *jumps)].contiguous()
            stride, strides = 1, (1,) * dimensions
        result = function(input, trace.value(weight), trace.value(bias), stride, padding, dilation, groups)

        def for_weight(delta: Tensor, x: Tensor) -> Any:
            sides = tuple(left for left, _ in pairs)
            if any(left != right for left, right in pairs):
                x = F.pad(x, [side for pair in reversed(pairs) for side in pair])
                sides = (0,) * dimensions
            geometry = Geometry(tuple(weight.shape), strides, sides, dilations, groups)
            return Convolution(delta, x, geometry, rows)

        return _tap(trace, result, after, rows, weight, for_weight, bias, input)

    rule.__name__ = function.__name__
    return rule


def _transposed(function: Callable[..., Tensor], dimensions: int) -> Callable[..., Tensor]:
    def rule(
        trace: Trace,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Tensor:
        name = f"F.conv_transpose{dimensions}d"
        rows, after = _layout(trace, name, input, dimensions)
        values = trace.value(weight), trace.value(bias)
        result = function(input, *values, stride, padding, output_padding, groups, dilation)
        kernel = tuple(weight.shape[2:])
        strides, dilations = _each(stride, dimensions), _each(dilation, dimensions)
        sides = [side for p in reversed(_each(padding, dimensions)) for side in (p, p)]

        def for_weight(delta: Tensor, x: Tensor) -> OuterProducts:
            unfolded = unfold(F.pad(delta, sides), kernel, strides, dilations, groups, x.shape[2:])
            grouped = x.reshape(len(x), groups, x.shape[1] // groups, -1)
            return OuterProducts(_by_sample(grouped, rows), _by_sample(unfolded, rows), weight.shape)

        return _tap(trace, result, after, rows, weight, for_weight, bias, input)

    rule.__name__ = function.__name__
    return rule


def _layout(trace: Trace, name: str, x: Tensor, dimensions: int) -> tuple[int, Layout]:
    if x.dim() != dimensions + 2:
        raise UnsupportedModelError(
            f"{name} was called with a tensor of {x.dim()} dimensions, whose dim 0 is the channels: add a leading "
            f"dimension for the samples, or {VMAP_OR_VJP}."
        )
    return trace.rows_of_sample(x, name), trace.layout(x, name)


def _tap(
    trace: Trace,
    result: Tensor,
    before: Layout,
    rows: int,
    weight: Tensor,
    for_weight: Callable[[Tensor, Tensor], Any],
    bias: Tensor | None,
    x: Tensor,
) -> Tensor:
    def for_bias(delta: Tensor, x: Tensor) -> Terms:
        # (B·R, O, L) as (B, R, O), the sum over the pixels taken at once.
        return Terms(delta.flatten(2).sum(2).reshape(before.batch, rows, -1))

    after = Layout(1, before.batch, result.numel() // before.batch)
    return trace.tap(result, after, [(weight, for_weight), (bias, for_bias)], (x,))


def _by_sample(x: Tensor, rows: int) -> Tensor:
    """`(B·R, G, C, L)` as `(B, G, C, R·L)`."""
    if rows == 1:
        return x
    return x.reshape(-1, rows, *x.shape[1:]).permute(0, 2, 3, 1, 4).flatten(3)


def _each(value: Any, dimensions: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * dimensions if len(values) == 1 else values


convolutions = {getattr(F, f"conv{n}d"): _convolution(getattr(F, f"conv{n}d"), n) for n in (1, 2, 3)}
transposed_convolutions = {
    getattr(F, f"conv_transpose{n}d"): _transposed(getattr(F, f"conv_transpose{n}d"), n) for n in (1, 2, 3)
}
