"""Finding the package's optimizer inside a trainer's wrapper."""

from __future__ import annotations

from typing import Any

from persample.errors import UsageError
from persample.vogn import VariationalOptimizer


def found_in(optimizer: Any) -> VariationalOptimizer | None:
    """Return this package's optimizer, unwrapped from `.optimizer`; None if it is another one."""
    inner = _unwrapped(optimizer)
    return inner if isinstance(inner, VariationalOptimizer) else None


def optimizer_in(optimizer: Any, way_out: str) -> VariationalOptimizer:
    """Return this package's optimizer, unwrapped from `.optimizer`.

    Raises:
        UsageError: it is none of this package; the message ends with the way out.
    """
    inner = _unwrapped(optimizer)
    if not isinstance(inner, VariationalOptimizer):
        raise UsageError(
            f"The optimizer is of type {type(inner).__name__}, which does not train a posterior: {way_out}."
        )
    return inner


def _unwrapped(optimizer: Any) -> Any:
    while not isinstance(optimizer, VariationalOptimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
