"""Convolutions of a single image whose groups of channels are the samples, each with its own copy of the weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from persample.sources.backends.fused.axis import Axis
from persample.sources.backends.fused.layout import Layout
from persample.sources.backends.fused.rules.expanded import copied
from persample.sources.backends.fused.trace import Trace

Rule = Callable[..., Any]


def in_groups(function: Callable[..., Tensor], rule: Rule) -> Rule:
    """Extend `rule`, which expects samples in dim 0, to samples in the channels.

    There the rows of weight and bias, `(B·O, …)`, are those of the samples, so that these operands are samples.
    """

    def for_groups(
        trace: Trace, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        layout = trace.layouts.get(input)
        axis = layout.axis(input.shape) if isinstance(layout, Layout) else None
        if not isinstance(layout, Layout) or axis is None or axis.dim != 1 or len(input) > 1:
            return rule(trace, input, weight, bias, *args, **kwargs)
        copies = {}
        for operand in (weight, bias):
            if operand is not None and trace.expression(operand) is not None and len(operand) % layout.rows == 0:
                rows = Axis(0, after=len(operand) // layout.rows)
                copies[id(operand)] = copied(trace, operand, operand.dim(), layout, rows)
        return trace.again(function, (input, weight, bias, *args), kwargs, copies)

    return for_groups
