"""Operations that are others in disguise: they are written out, and the rules of those do the work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from persample.sources.fused.capture import Capture


def addmm(capture: Capture, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """β b + α (x @ P), for matrices, batches of matrices and vectors."""
    with capture:
        product = mat1 @ mat2
        product = product if alpha == 1 else alpha * product
        return product + (input if beta == 1 else beta * input)


def masked_fill(capture: Capture, input: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    """The parameter where the mask is, x elsewhere."""
    with capture:
        return torch.where(mask, value, input)


def prelu(capture: Capture, input: Tensor, weight: Tensor) -> Tensor:
    """X where it is positive, w ∘ x elsewhere; w has one entry, or one for each channel, dim 1."""
    with capture:
        if weight.numel() > 1 and input.dim() > 2:
            weight = weight.view(-1, *[1] * (input.dim() - 2))
        return torch.where(input > 0, input, weight * input)


def bilinear(capture: Capture, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x₁ᵀ W_o x₂ for each output o: a linear layer on the products of the entries."""
    with capture:
        products = (input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2)
        return F.linear(products, weight.flatten(1), bias)


def matmul(capture: Capture, first: Tensor, second: Tensor) -> Any:
    """Products with a vector or a matrix in front are products with a matrix behind: P x = (xᵀ Pᵀ)ᵀ."""
    in_front = capture.expression(first) is not None
    with capture:
        if in_front and first.dim() == 1:
            return (second.mT @ first.unsqueeze(1)).squeeze(-1)
        if in_front and first.dim() == 2 and second.dim() > 2:
            return (second.mT @ first.mT).mT
        if not in_front and second.dim() == 1:
            return (first @ second.unsqueeze(1)).squeeze(-1)
    return capture.fall_back(torch.matmul, (first, second), {})


def looked_up(capture: Capture, table: Tensor, index: Any) -> Any:
    """`parameter[indices]`, with indices of samples for its first dimension, is an embedding."""
    if not isinstance(index, Tensor) or index.dtype == torch.bool or capture.expression(table) is None:
        return capture.fall_back(Tensor.__getitem__, (table, index), {})
    with capture:
        rows = table.flatten(1) if table.dim() > 1 else table.unsqueeze(1)
        return F.embedding(index % len(table), rows).view(*index.shape, *table.shape[1:])


def index_select(capture: Capture, input: Tensor, dim: int, index: Tensor) -> Any:
    """The same by another name."""
    if capture.expression(input) is None or dim % input.dim() != 0:
        return capture.fall_back(torch.index_select, (input, dim, index), {})
    return looked_up(capture, input, index)
