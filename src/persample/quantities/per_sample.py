"""The gradients themselves."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from persample.quantities.block import Block
from persample.quantities.protocol import Accumulation, Setting


@dataclass(frozen=True)
class PerSample:
    """g_i, `{name: (B, *parameter.shape)}`: the one quantity that takes B times the memory of the parameters."""

    name: str = "per_sample"

    def begin(self, setting: Setting) -> Accumulation[dict[str, Tensor]]:
        return _PerSample(setting)


class _PerSample(Accumulation[dict[str, Tensor]]):
    def __init__(self, setting: Setting) -> None:
        self._rows = {name: p.new_zeros((setting.size, *p.shape)) for name, p in setting.parameters.items()}

    def add(self, block: Block) -> None:
        rows = self._rows[block.name][block.samples]
        for where, g in block.pieces():
            rows[where] = g.to(rows.dtype)

    def result(self) -> dict[str, Tensor]:
        return self._rows
