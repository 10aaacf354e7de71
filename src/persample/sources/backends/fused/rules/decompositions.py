"""Operations that are rewritten as others, whose rules then do the work."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from persample.sources.backends.fused.indexing import is_mask, read, selecting
from persample.sources.backends.fused.rules.expanded import batched
from persample.sources.backends.fused.torch_function_bypass import opened
from persample.sources.backends.fused.trace import Trace


def addmm(trace: Trace, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """β b + α (x @ P), for matrices, batches of matrices and vectors."""
    with trace:
        product = mat1 @ mat2
        product = product if alpha == 1 else alpha * product
        return product + (input if beta == 1 else beta * input)


def linear(trace: Trace, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` with a vector for weight."""
    with trace:
        product = input @ weight
        result: Tensor = product if bias is None else product + bias
        return result


def masked_fill(trace: Trace, input: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    """The parameter where the mask is, x elsewhere."""
    with trace:
        return torch.where(mask, value, input).contiguous()


def prelu(trace: Trace, input: Tensor, weight: Tensor) -> Tensor:
    """X where it is positive, w ∘ x elsewhere; w has one entry, or one for each channel, dim 1."""
    with trace:
        if weight.numel() > 1 and input.dim() > 2:
            weight = weight.view(-1, *[1] * (input.dim() - 2))
        return torch.where(input > 0, input, weight * input)


def bilinear(trace: Trace, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x₁ᵀ W_o x₂ for each output o: a linear layer on the products of the entries."""
    with trace:
        products = (input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2)
        return F.linear(products, weight.flatten(1), bias)


def matmul(trace: Trace, first: Tensor, second: Tensor) -> Any:
    """Products with a vector or a matrix on the left, as products with a matrix on the right: P x = (xᵀ Pᵀ)ᵀ."""
    in_front = trace.expression(first) is not None
    with trace:
        if in_front and first.dim() == 1:
            return (second.mT @ first.unsqueeze(1)).squeeze(-1)
        if in_front and first.dim() == 2 and second.dim() > 2:
            return (second.mT @ first.mT).mT.contiguous()
        if not in_front and second.dim() == 1:
            return (first @ second.unsqueeze(1)).squeeze(-1)
        if not in_front and second.dim() == 2 and second.numel() == 0:
            return first.new_zeros(*first.shape[:-1], second.shape[1])
    return trace.fall_back(torch.matmul, (first, second), {})


def looked_up(trace: Trace, table: Tensor, index: Any) -> Any:
    """`parameter[:, i, j]`, with indices of samples, is an embedding by the number i · size + j."""
    if trace.expression(table) is None:
        return trace.fall_back(Tensor.__getitem__, (table, index), {})
    with trace:
        lookup = read(index, table)
        table = table[lookup.basic]
        numbers = {d: n for dim, given in lookup.tensors.items() for d, n in enumerate(_numbers(given), dim)}
        table = table.permute(*numbers, *[d for d in range(table.dim()) if d not in numbers])
        sizes, rest = table.shape[: len(numbers)], table.shape[len(numbers) :]
        number = _linear(numbers.values(), sizes)
        rows = F.embedding(number, table.reshape(sizes.numel(), -1)).unflatten(-1, rest or (1,))
        rows = rows if rest else rows.squeeze(-1)
        before = range(lookup.before)
        return rows.movedim([number.dim() + d for d in before], [*before])


def _linear(numbers: Iterable[Tensor], sizes: Iterable[int]) -> Any:
    """The number i · size + j, and so on, of indices that may be negative."""
    number: Any = 0
    for n, size in zip(numbers, sizes, strict=True):
        if bool(((n < -size) | (n >= size)).any()):
            raise IndexError("an index is out of range")
        number = number * size + n % size
    return number


def _numbers(given: Tensor) -> list[Tensor]:
    """The indices that a mask selects, one tensor for each of its dimensions; index tensors stay as they are."""
    if not is_mask(given):
        return [given.long()]
    mask = given.bool() if given.dim() > 0 else given.bool().unsqueeze(0)
    indices = [torch.arange(size, device=mask.device) for size in mask.shape]
    return [index[mask] for index in torch.meshgrid(*indices, indexing="ij")]


def take(trace: Trace, input: Tensor, index: Tensor) -> Any:
    """`parameter.flatten()[indices]`."""
    if trace.expression(input) is None:
        return trace.fall_back(torch.take, (input, index), {})
    with trace:
        return input.flatten()[index]


def index_select(trace: Trace, input: Tensor, dim: int, index: Tensor) -> Any:
    """An alias."""
    if trace.expression(input) is None:
        return trace.fall_back(torch.index_select, (input, dim, index), {})
    with trace:
        return input[selecting(dim, index, input.dim())]


def gather(trace: Trace, input: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
    """Entry (i, j, …) of the result is the parameter's entry (index, j, …), with the index in place of i for dim 0."""
    if trace.expression(input) is None or trace.expression(index) is not None or index.dim() == 0:
        return trace.fall_back(torch.gather, (input, dim, index), {})
    dim = dim % index.dim()
    with trace:
        table = input.unsqueeze(0) if input.dim() == 0 else input
        steps = [math.prod(table.shape[d + 1 :]) for d in range(table.dim())]
        number = index * steps[dim]
        for d in range(table.dim()):
            if d != dim:
                along = torch.arange(index.shape[d], device=index.device) * steps[d]
                number = number + along.view([-1 if k == d else 1 for k in range(index.dim())])
        return table.flatten()[number]


def embedding(
    trace: Trace,
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """`torch.embedding`, which `F.embedding` calls."""
    padding = None if padding_idx < 0 else padding_idx
    with trace:
        return F.embedding(indices, weight, padding, scale_grad_by_freq=scale_grad_by_freq)


def solve(trace: Trace, A: Tensor, B: Tensor, *, left: bool = True) -> Any:  # noqa: N803 - PyTorch's names
    """`torch.linalg.solve`, of which a right-hand side may be vectors."""
    if B.dim() == 1 or B.shape == A.shape[:-1]:
        with trace:
            return torch.linalg.solve(A, B.unsqueeze(-1), left=left).squeeze(-1)
    return batched(trace, torch.linalg.solve, (A, B), {"left": left})


def linear_cross_entropy(trace: Trace, *args: Any, **kwargs: Any) -> Any:
    """Without PyTorch's chunks, which hide the parameters from autograd."""
    function: Any = F.linear_cross_entropy
    return trace.again(opened(function), args, kwargs | {"options": None}, {})
