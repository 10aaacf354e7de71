"""Operations that use a parameter's value, shape or type, but have no gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from persample.sources.backends.fused.carry import plain
from persample.sources.backends.fused.trace import Trace


def values_alone(trace: Trace, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Comparisons, which have no gradient."""
    values, named = trace.values((args, dict(kwargs)))
    return plain(trace, func, values, named)


def as_told(trace: Trace, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Conversions of the first operand to the shape or type of another."""
    first, *others = args
    if trace.expression(first) is None:
        values, named = trace.values((tuple(others), dict(kwargs)))
        return plain(trace, func, (first, *values), named)
    return trace.express(func, args, kwargs)
