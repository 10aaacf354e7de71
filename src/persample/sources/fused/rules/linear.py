"""y = x Wᵀ + b at each position: g_i = Σ_l δ_il x_ilᵀ for the weight, Σ_l δ_il for the bias."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from persample.sources.contributions import Terms
from persample.sources.fused.layout import Layout
from persample.sources.fused.linear import LinearProducts

if TYPE_CHECKING:
    from persample.sources.fused.capture import Capture


def linear(capture: Capture, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`."""
    layout = capture.layout(input, "F.linear")
    outputs, inputs = weight.shape
    layout.require_features(inputs, outputs)
    after = Layout(layout.outer, layout.batch, layout.inner // inputs * outputs)
    # Of two dimensions the result is no view, so the tap can take it.
    result = F.linear(input.reshape(-1, inputs), capture.value(weight), capture.value(bias))

    def for_weight(delta: Tensor, x: Tensor) -> LinearProducts:
        return LinearProducts(after.sample_first(delta, outputs), layout.sample_first(x, inputs))

    def for_bias(delta: Tensor, x: Tensor) -> Terms:
        return Terms(after.sample_first(delta, outputs))

    tapped = capture.tap(result, after, [(weight, for_weight), (bias, for_bias)], (input,))
    return capture.follow_as(tapped.view(*input.shape[:-1], outputs), after)


def matmul(capture: Capture, x: Tensor, other: Tensor) -> Any:
    """`x @ P` with samples in x and a matrix P made of parameters: a linear layer with the weight Pᵀ."""
    if capture.expression(other) is None or other.dim() != 2 or x.dim() < 2:
        return capture.fall_back(Tensor.matmul, (x, other), {})
    return _product(capture, "matmul", x, other, None)


def addmm(capture: Capture, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """`b + x @ P`: a linear layer with the weight Pᵀ and the bias b."""
    no_product = capture.expression(mat2) is None or capture.expression(mat1) is not None
    if no_product or input.dim() != 1 or input.shape[0] != mat2.shape[1] or (beta, alpha) != (1, 1):
        return capture.fall_back(torch.addmm, (input, mat1, mat2), {"beta": beta, "alpha": alpha})
    return _product(capture, "addmm", mat1, mat2, input)


def _product(capture: Capture, name: str, x: Tensor, other: Tensor, bias: Tensor | None) -> Tensor:
    layout = capture.layout(x, name)
    inputs, outputs = other.shape
    layout.require_features(inputs, outputs)
    after = Layout(layout.outer, layout.batch, layout.inner // inputs * outputs)
    result = x.reshape(-1, inputs) @ capture.value(other)
    if bias is not None:
        result += capture.value(bias)

    def for_matrix(delta: Tensor, x: Tensor) -> LinearProducts:
        return LinearProducts(layout.sample_first(x, inputs), after.sample_first(delta, outputs))

    def for_bias(delta: Tensor, x: Tensor) -> Terms:
        return Terms(after.sample_first(delta, outputs))

    tapped = capture.tap(result, after, [(other, for_matrix), (bias, for_bias)], (x,))
    return capture.follow_as(tapped.view(*x.shape[:-1], outputs), after)
