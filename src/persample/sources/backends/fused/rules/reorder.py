"""Rules that need the samples in order in dim 0, for tensors that hold them in another order.

The rows of time-first frames, (T·B, C, …), or of frames that were picked or packed, are put in the order of the samples
before the operation, and back into their own order after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from persample.sources.backends.fused.axis import Axis
from persample.sources.backends.fused.layout import Layout
from persample.sources.backends.fused.memory_format import memory_format
from persample.sources.backends.fused.trace import Trace

Rule = Callable[..., Any]


def in_order(rule: Rule) -> Rule:
    """Extend `rule`, whose first operand needs the samples in order in dim 0, to any order."""

    def for_any_order(trace: Trace, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        layout = trace.layout(input, getattr(rule, "__name__", "An operation"))
        axis = layout.axis(input.shape)
        if axis is None or axis.dim != 0 or (axis.before == 1 and layout.owners is None):
            return rule(trace, input, *args, **kwargs)
        rows = layout.by_sample(input.flatten(1) if input.dim() > 1 else input.unsqueeze(1), axis)
        images = _as(input, rows.flatten(0, 1).unflatten(1, input.shape[1:]))
        trace.follow_as(images, Layout(1, layout.batch, images.numel() // layout.batch))
        result = rule(trace, images, *args, **kwargs)
        return trace.follow_as(_back(result, layout, axis), layout.at(axis, (len(input), *result.shape[1:])))

    return for_any_order


def _as(given: Tensor, x: Tensor) -> Tensor:
    """Return `x` in the memory format of `given`."""
    return x.contiguous(memory_format=memory_format(given))


def _back(images: Tensor, layout: Layout, axis: Axis) -> Tensor:
    result = images
    if layout.owners is not None:
        result = result.unflatten(0, (-1, axis.folded))[layout.owners.slots].flatten(0, 1)
        rows = layout.rows
    else:
        rows = layout.batch
    parts: Tensor = result.unflatten(0, (rows, axis.before, axis.after))
    return _as(images, parts.transpose(0, 1).flatten(0, 2))
