"""Sums by parameter, to which blocks are added."""

from __future__ import annotations

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

    def precise(self) -> dict[str, Tensor]:
        """Return the sums in the dtype in which they were taken."""
        return {
            name: self._sums[name] if name in self._sums else at_least_float32(torch.zeros_like(p))
            for name, p in self._parameters.items()
        }

    def divided(self, divisor: float = 1) -> dict[str, Tensor]:
        """Return the sums over `divisor`, in the dtypes of the parameters and in memory of their own."""
        return self.in_own_dtype({name: value / divisor for name, value in self.precise().items()})

    def in_own_dtype(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `values` in the dtypes of the parameters."""
        return {name: values[name].to(p.dtype) for name, p in self._parameters.items()}
