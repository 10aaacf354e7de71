"""The norms of the gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from persample.quantities.block import Block
from persample.quantities.parts import ByGroup, Per
from persample.quantities.protocol import Accumulation, Setting


@dataclass(frozen=True)
class Norms:
    """‖g_i‖₂ of each sample, shape `(B,)`.

    It is the root of a sum of squares, so as PyTorch's own norms it overflows to infinity, or loses digits down to
    zero, where the squares do: in float32 above 1.8e19 and below 1e-19, in float64 above 1e154 and below 1e-154.

    Attributes:
        per: None for the norm over all parameters together; `"parameter"` for a dict with the norms by each; or a dict
            of the names of parameters (or of modules) by group, for a dict with the norms by each group.

    Raises:
        OptionError: `per` names no parameter, or one in two groups.
    """

    per: Per = None
    name: str = "norms"

    def begin(self, setting: Setting) -> Accumulation[Tensor | dict[str, Tensor]]:
        return _Norms(ByGroup(self.per, setting, setting.size))


class _Norms(Accumulation[Tensor | dict[str, Tensor]]):
    reads = ("squared_norms",)

    def __init__(self, squares: ByGroup) -> None:
        self._squares = squares
        self._waiting: dict[str, list[Tensor]] = {}  # those of all samples by one parameter, to be added up at once

    def add(self, block: Block) -> None:
        squares = self._squares.of(block.name)
        if squares is None:
            return
        found = block.squared_norms().to(squares)
        if len(found) == len(squares):
            self._waiting.setdefault(self._squares.groups[block.name], []).append(found)
        else:
            squares[block.samples] += found

    def result(self) -> Tensor | dict[str, Tensor]:
        for group, waiting in self._waiting.items():
            self._squares.values[group] += torch.stack(waiting).sum(0)
        self._waiting = {}
        found = self._squares.result()
        return found.sqrt() if isinstance(found, Tensor) else {group: s.sqrt() for group, s in found.items()}
