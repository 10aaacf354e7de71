"""The mean squared gradient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from persample.quantities.block import Block
from persample.quantities.protocol import Accumulation, Setting
from persample.quantities.totals import Totals


@dataclass(frozen=True)
class SecondMoment:
    """Σ_i g_i² / B, element by element, for each parameter, by its name."""

    name: str = "second_moment"

    def begin(self, setting: Setting) -> Accumulation[dict[str, Tensor]]:
        return _SecondMoment(setting)


class _SecondMoment(Accumulation[dict[str, Tensor]]):
    reads = ("sums",)

    def __init__(self, setting: Setting) -> None:
        self._size, self._totals = setting.size, Totals(setting)

    def add(self, block: Block) -> None:
        self._totals.add(block.name, block.sums()[1])

    def result(self) -> dict[str, Tensor]:
        return self._totals.divided(self._size)
