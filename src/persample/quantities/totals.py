"""Sums by parameter, to which blocks are added."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from persample.dtypes import at_least_float32
from persample.quantities.protocol import Setting


class Totals:
    """Sums by parameter, in at least float32; zeros where nothing was added."""

    def __init__(self, setting: Setting) -> None:
        self._parameters = setting.parameters
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def take(self, name: str) -> Tensor:
        """Return the sum for a parameter in the dtype in which it was taken, and forget it."""
        if name in self._sums:
            return self._sums.pop(name)
        return at_least_float32(torch.zeros_like(self._parameters[name]))

    def result(self, made: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return what is made for each parameter, one after the other, in its dtype."""
        return {name: made(name).to(p.dtype) for name, p in self._parameters.items()}

    def divided(self, divisor: float) -> dict[str, Tensor]:
        """Return the sums over `divisor`, in memory of their own: others may hold the same sums."""
        return self.result(lambda name: self.take(name) / divisor)
