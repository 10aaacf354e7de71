"""y = x Wᵀ + b at each position: g_i = Σ_l δ_il x_ilᵀ for the weight, Σ_l δ_il for the bias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from persample.kernels.linear import linear_gradient_of_inputs, linear_outputs
from persample.sources.backends.contributions import Contribution, Terms, precise
from persample.sources.backends.fused.linear import LinearProducts
from persample.sources.backends.fused.rules import decompositions
from persample.sources.backends.fused.trace import Trace


def linear(trace: Trace, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`."""
    if weight.dim() == 1:
        return decompositions.linear(trace, input, weight, bias)
    if weight.shape[1] == 0:  # nothing of the samples enters, only the bias is left
        shape = (*input.shape[:-1], weight.shape[0])
        return input.new_zeros(shape) if bias is None else trace.again(Tensor.expand, (bias, shape), {}, {})
    layout = trace.layout_of_rows(input, "F.linear")
    outputs, inputs = weight.shape
    layout.require_features(inputs, outputs)
    after = layout.with_features(inputs, outputs)

    def for_weight(delta: Tensor, x: Tensor) -> LinearProducts:
        return LinearProducts(after.sample_first(delta, outputs), layout.sample_first(x, inputs))

    def for_bias(delta: Tensor, x: Tensor) -> Terms:
        return Terms(after.sample_first(delta, outputs))

    # Of two dimensions the result is no view, so the tap can take it.
    values = trace.value(weight), trace.value(bias)
    if all(v is None or (v.dtype, v.requires_grad) == (input.dtype, False) for v in values) and not _autocast(input):

        def forward(x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
            return linear_outputs(x, *values), (x,)

        def backward(delta: Tensor, x: Tensor, wanted: bool) -> tuple[Tensor | None, Sequence[Contribution]]:
            gradient = linear_gradient_of_inputs(delta, values[0], x.shape[:-1]) if wanted else None
            delta, x = precise(delta), precise(x)
            return gradient, (for_weight(delta, x), for_bias(delta, x))

        result = trace.run(forward, backward, input, after, (weight, bias))
    else:
        result = F.linear(input.reshape(-1, inputs), *values)
        result = trace.tap(result, after, [(weight, for_weight), (bias, for_bias)], (input,))
    return trace.follow_as(result.view(*input.shape[:-1], outputs), after)


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def matmul(trace: Trace, x: Tensor, other: Tensor) -> Any:
    """`x @ P` with samples in x and a matrix P of parameters: a linear layer with the weight Pᵀ."""
    of_matrix = other.dim() == 2 and x.dim() >= 2 and other.numel() > 0
    if trace.expression(other) is None or trace.expression(x) is not None or not of_matrix:
        return decompositions.matmul(trace, x, other)
    layout = trace.layout_of_rows(x, "matmul")
    inputs, outputs = other.shape
    layout.require_features(inputs, outputs)
    after = layout.with_features(inputs, outputs)
    result = x.reshape(-1, inputs) @ trace.value(other)

    def contribution(delta: Tensor, x: Tensor) -> LinearProducts:
        return LinearProducts(layout.sample_first(x, inputs), after.sample_first(delta, outputs))

    tapped = trace.tap(result, after, [(other, contribution)], (x,))
    return trace.follow_as(tapped.view(*x.shape[:-1], outputs), after)
