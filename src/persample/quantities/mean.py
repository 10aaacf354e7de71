"""The mean gradient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from persample.quantities.block import Block
from persample.quantities.protocol import Accumulation, Setting
from persample.quantities.totals import Totals


@dataclass(frozen=True)
class Mean:
    """Σ_i g_i / B for each parameter, by its name."""

    name: str = "mean"

    def begin(self, setting: Setting) -> Accumulation[dict[str, Tensor]]:
        return _Mean(setting)


class _Mean(Accumulation[dict[str, Tensor]]):
    reads = ("sums",)

    def __init__(self, setting: Setting) -> None:
        self._size, self._totals = setting.size, Totals(setting)

    def add(self, block: Block) -> None:
        self._totals.add(block.name, block.sums()[0])

    def result(self) -> dict[str, Tensor]:
        return self._totals.divided(self._size)
