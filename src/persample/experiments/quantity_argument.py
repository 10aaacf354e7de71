"""The quantities that a command is asked for, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from persample.errors import OptionError
from persample.quantities import (
    Gram,
    Mean,
    Norms,
    PerSample,
    Projection,
    Quantity,
    SecondMoment,
    Variance,
    WeightedSum,
    clipping,
)

#: How to make each. The gradients are clipped to norm 1, and projected to 64 numbers.
QUANTITIES: dict[str, Callable[[], Quantity[Any]]] = {
    "mean": Mean,
    "second-moment": SecondMoment,
    "variance": Variance,
    "norms": Norms,
    "clipped-sum": lambda: WeightedSum(clipping(1.0)),
    "gram": Gram,
    "projection": lambda: Projection(64),
    "per-sample": PerSample,
}


def quantities_of(names: Sequence[str] | None) -> list[Quantity[Any]]:
    """Return the quantities that are called so, each once.

    Raises:
        OptionError: one of them is not known.
    """
    names = list(dict.fromkeys(names or ()))
    if unknown := [name for name in names if name not in QUANTITIES]:
        raise OptionError(f"no quantity is called {unknown[0]!r}; choose among {', '.join(QUANTITIES)}")
    return [QUANTITIES[name]() for name in names]
