"""A bare parameter added to samples, multiplied with them, or put beside them (class token, position, scale)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from persample.errors import UnsupportedModelError
from persample.sources.contributions import Contribution, Terms
from persample.sources.fused.expressions import Expression
from persample.sources.fused.layout import Layout
from persample.sources.fused.own_rows import OwnRows
from persample.sources.fused.places import Place

if TYPE_CHECKING:
    from persample.sources.fused.capture import Capture


def add(capture: Capture, x: Any, other: Any, *, alpha: float = 1, **others: Any) -> Any:
    """For y = x + p: g_i = δ_i, summed over what was broadcast."""
    attached = None if others or alpha != 1 else _attached(capture, x, other)
    if attached is None:
        return capture.fall_back(torch.add, (x, other), {"alpha": alpha, **others})

    def contribution(delta: Tensor) -> Contribution:
        return attached.contribution(delta)

    result = torch.add(capture.value(x), capture.value(other))
    return capture.tap(result, attached.layout, [(attached.expression, contribution)])


def multiply(capture: Capture, x: Any, other: Any, **others: Any) -> Any:
    """For y = x ∘ p: g_i = δ_i ∘ x_i, summed over what was broadcast."""
    attached = None if others else _attached(capture, x, other)
    if attached is None:
        return capture.fall_back(torch.mul, (x, other), others)

    def contribution(delta: Tensor, samples: Tensor) -> Contribution:
        return attached.contribution(delta * samples)

    result = torch.mul(capture.value(x), capture.value(other))
    return capture.tap(result, attached.layout, [(attached.expression, contribution)], (attached.samples,))


@dataclass(frozen=True)
class _Attached:
    """A parameter that is broadcast to samples.

    Attributes:
        expression: the parameter, or the expression of parameters.
        samples: the samples; they have the shape of the result.
        layout: where the samples are.
        dim: which dimension that is.
    """

    expression: Expression
    samples: Tensor
    layout: Layout
    dim: int

    def contribution(self, terms: Tensor) -> Contribution:
        """Sum what has the result's shape to the parameter's, for each sample."""
        shape = self.expression.value.shape
        by_sample = terms.movedim(self.dim, 0)
        # One entry for each dimension of the result but the sample's; the parameter's own first ones may be missing.
        aligned = [1] * (terms.dim() - len(shape)) + list(shape)
        own = aligned.pop(self.dim)
        summed = summed_to(by_sample, aligned)
        if own == 1:
            return Terms(summed.reshape(len(summed), 1, *shape))
        own_dim = self.dim - terms.dim() + len(shape)
        rows = summed.reshape(len(summed), *shape[:own_dim], 1, *shape[own_dim + 1 :])
        return OwnRows(rows, Place(own_dim), len(summed))


def _attached(capture: Capture, x: Any, other: Any) -> _Attached | None:
    """Return how one operand is a parameter broadcast to the samples in the other, or None if that is not so."""
    p, samples = (x, other) if capture.expression(x) is not None else (other, x)
    expression = capture.expression(p)
    if expression is None or capture.expression(samples) is not None or not isinstance(samples, Tensor):
        return None
    layout = capture.layouts.get(samples)
    found = layout.dim(samples.shape) if layout is not None else None
    if (
        layout is None
        or found is None
        or found[1:] != (1, 1)
        or torch.broadcast_shapes(p.shape, samples.shape) != samples.shape
    ):
        return None
    dim = found[0]
    own_dim = dim - samples.dim() + p.dim()
    if own_dim == 0 and expression.expanded is not None and expression.expanded.value.dim() == p.dim():
        expression = expression.expanded
    return _Attached(expression, samples, layout, dim)


def summed_to(t: Tensor, shape: Sequence[int]) -> Tensor:
    """Sum `t`, `(B, *larger)`, over the dimensions that have size 1 in `shape`."""
    dims = [d + 1 for d, size in enumerate(shape) if size == 1 and t.shape[d + 1] != 1]
    return t.sum(dims, keepdim=True) if dims else t


def concatenate(capture: Capture, tensors: Sequence[Tensor], dim: int = 0, **others: Any) -> Tensor:
    """For y = [x, p] along a dimension that is not the sample's: g_i is the part of δ_i where p stands."""
    samples = next((t for t in tensors if t in capture.layouts), None)
    dim = kwargs_dim(others, dim)
    layout = capture.layout(samples, "torch.cat") if samples is not None else None
    found = layout.dim(samples.shape) if layout is not None and samples is not None else None
    result = torch.cat([capture.value(t) for t in tensors], dim)
    dim %= result.dim()
    if samples is None or layout is None or found != (0, 1, 1) or dim == 0:
        raise UnsupportedModelError(
            "torch.cat puts a parameter beside samples that are not in dim 0, or along dim 0: backend 'fused' has no "
            "rule for that. Keep dim 0 for the samples, or use backend 'vmap' or 'loop'."
        )
    operands = []
    start = 0
    for tensor in tensors:
        expression = capture.expression(tensor)
        if expression is not None:
            operands.append(_part(expression, dim, start, tensor.shape[dim]))
        start += tensor.shape[dim]
    return capture.tap(result, capture.batch_first(result), operands)


def _part(expression: Expression, dim: int, start: int, length: int) -> tuple[Expression, Callable[..., Contribution]]:
    one = expression.expanded

    def contribution(delta: Tensor) -> Contribution:
        part = delta.narrow(dim, start, length)
        if one is None:
            return OwnRows(part.unsqueeze(1), Place(0), len(part))
        return Terms(part.reshape(len(part), 1, *one.value.shape))

    return one or expression, contribution


def kwargs_dim(others: dict[str, Any], dim: int) -> int:
    """`torch.cat` also knows its dimension as `axis`."""
    return int(others.get("axis", dim))
