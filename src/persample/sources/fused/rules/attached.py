"""A bare parameter that is added to samples, multiplied with them, or put beside them (class token, position, scale)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from persample.errors import UnsupportedModelError
from persample.sources.contributions import Terms
from persample.sources.fused.expressions import Expression


def add(capture: Any, x: Tensor, other: Any, *, alpha: float = 1, **others: Any) -> Tensor:
    """y = x + α p: g_i = α δ_i, summed over what was broadcast."""
    if others or alpha != 1 or not _samples_fill_result(capture, x, other):
        return capture.fall_back(torch.add, (x, other), {"alpha": alpha, **others})
    return _broadcast(capture, torch.add, x, other, lambda delta, samples: delta)


def multiply(capture: Any, x: Tensor, other: Any, **others: Any) -> Tensor:
    """y = x ∘ p: g_i = δ_i ∘ x_i, summed over what was broadcast."""
    if others or not _samples_fill_result(capture, x, other):
        return capture.fall_back(torch.mul, (x, other), others)
    return _broadcast(capture, torch.mul, x, other, lambda delta, samples: delta * samples)


def _samples_fill_result(capture: Any, x: Any, other: Any) -> bool:
    """Whether one operand holds samples in the result's shape and the other is a parameter broadcast to it."""
    p, samples = (x, other) if capture.expression(x) is not None else (other, x)
    if capture.expression(p) is None or capture.expression(samples) is not None:
        return False
    if not isinstance(samples, Tensor) or torch.broadcast_shapes(p.shape, samples.shape) != samples.shape:
        return False
    layout = capture.layouts.get(samples)
    found = layout.dim(samples.shape) if layout is not None else None
    if found is None or found[1:] != (1, 1):
        return False
    p_dim = found[0] - samples.dim() + p.dim()
    return p_dim < 0 or p.shape[p_dim] == 1 or capture.expression(p).expanded is not None and p_dim == 0


def _broadcast(
    capture: Any,
    operation: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    other: Tensor,
    terms: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    p, samples = (x, other) if capture.expression(x) is not None else (other, x)
    expression: Expression = capture.expression(p)
    layout = capture.layout(samples, operation.__name__)
    place = layout.dim(samples.shape)[0]
    result = operation(capture.value(x), capture.value(other))
    if expression.expanded is not None and p.dim() == samples.dim() and place == 0:
        expression = expression.expanded
    shape = expression.value.shape

    def contribution(delta: Tensor, samples: Tensor) -> Terms:
        t = terms(delta, samples).movedim(place, 0)
        # The parameter's shape beside the sample, one entry for each dimension of the samples.
        aligned = [1] * (delta.dim() - len(shape)) + list(shape)
        rest = aligned[:place] + aligned[place + 1 :] if len(aligned) == delta.dim() else aligned[1:]
        return Terms(summed_to(t, rest).reshape(len(t), 1, *shape))

    return capture.tap(result, layout, [(expression, contribution)], (samples,))


def summed_to(t: Tensor, shape: Sequence[int]) -> Tensor:
    """Sum `t`, `(B, *larger)`, over the dimensions that have size 1 in `shape`."""
    dims = [d + 1 for d, size in enumerate(shape) if size == 1 and t.shape[d + 1] != 1]
    return t.sum(dims, keepdim=True) if dims else t


def concatenate(capture: Any, tensors: Sequence[Tensor], dim: int = 0, **others: Any) -> Tensor:
    """y = [x, p] along a dimension that is not the sample's: g_i is the part of δ_i where p stands."""
    samples = next((t for t in tensors if t in capture.layouts), None)
    dim = kwargs_dim(others, dim)
    layout = capture.layout(samples, "torch.cat") if samples is not None else None
    found = layout.dim(samples.shape) if layout is not None and samples is not None else None
    result = torch.cat([capture.value(t) for t in tensors], dim)
    dim %= result.dim()
    if samples is None or layout is None or found != (0, 1, 1) or dim == 0:
        raise UnsupportedModelError(
            "torch.cat puts a parameter beside samples that are not in dim 0, or along dim 0: backend 'fused' has no rule "
            "for that. Keep dim 0 for the samples, or use backend 'vmap' or 'loop'."
        )
    operands = []
    start = 0
    for tensor in tensors:
        expression = capture.expression(tensor)
        if expression is not None:
            if expression.expanded is None and capture.batch_size != 1:
                raise UnsupportedModelError(
                    "torch.cat puts a parameter beside the samples that has an entry for each of them: expand it from "
                    "one entry (parameter.expand(len(x), -1, -1)), or use backend 'vmap' or 'loop'."
                )
            operands.append(_part(expression.expanded or expression, dim, start, tensor.shape[dim]))
        start += tensor.shape[dim]
    return capture.tap(result, capture.batch_first(result), operands)


def _part(expression: Expression, dim: int, start: int, length: int) -> tuple[Expression, Callable[..., Terms]]:
    def contribution(delta: Tensor) -> Terms:
        part = delta.narrow(dim, start, length)
        return Terms(part.reshape(len(part), 1, *expression.value.shape))

    return expression, contribution


def kwargs_dim(others: dict[str, Any], dim: int) -> int:
    """`torch.cat` also knows its dimension as `axis`."""
    return int(others.get("axis", dim))
