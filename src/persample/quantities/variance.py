"""The variance of the gradients over the samples."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from persample.errors import UsageError
from persample.quantities.block import Block
from persample.quantities.protocol import Accumulation, Setting
from persample.quantities.totals import Totals


@dataclass(frozen=True)
class Variance:
    """Σ_i (g_i − ḡ)² / (B − 1), element by element, for each parameter, by its name.

    It is taken from the first two moments, so where it is smaller than ḡ² it has that much fewer digits.

    Raises:
        UsageError: there is but one gradient.
    """

    name: str = "variance"

    def begin(self, setting: Setting) -> Accumulation[dict[str, Tensor]]:
        if setting.size < 2:
            raise UsageError("The variance of one gradient is not defined: pass a batch of at least two samples.")
        return _Variance(setting)


class _Variance(Accumulation[dict[str, Tensor]]):
    reads = ("sums",)

    def __init__(self, setting: Setting) -> None:
        self._size, self._totals, self._squares = setting.size, Totals(setting), Totals(setting)

    def add(self, block: Block) -> None:
        total, squares = block.sums()
        self._totals.add(block.name, total)
        self._squares.add(block.name, squares)

    def result(self) -> dict[str, Tensor]:
        return self._squares.result(self._of)

    def _of(self, name: str) -> Tensor:
        total, squares = self._totals.take(name), self._squares.take(name)
        return ((squares - total.square() / self._size) / (self._size - 1)).clamp_(min=0)
