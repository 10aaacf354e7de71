"""The optimizer of this package inside of what a trainer has made of it."""

from __future__ import annotations

from typing import Any

from persample.errors import UsageError
from persample.vogn import VariationalOptimizer


def found_in(optimizer: Any) -> VariationalOptimizer | None:
    """Return the optimizer that `optimizer` is, or wraps as its `.optimizer`; None if it is none of this package."""
    inner = _unwrapped(optimizer)
    return inner if isinstance(inner, VariationalOptimizer) else None


def optimizer_in(optimizer: Any, way_out: str) -> VariationalOptimizer:
    """Return the optimizer that `optimizer` is, or wraps as its `.optimizer`.

    Raises:
        UsageError: it is none of this package; the message ends with the way out.
    """
    inner = _unwrapped(optimizer)
    if not isinstance(inner, VariationalOptimizer):
        raise UsageError(f"The optimizer is of type {type(inner).__name__}, which trains no posterior: {way_out}.")
    return inner


def _unwrapped(optimizer: Any) -> Any:
    while not isinstance(optimizer, VariationalOptimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
