"""Blocks of contributions, kept as factors: the gradients themselves are formed on request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from persample.dtypes import at_least_float32
from persample.quantities.block import Block, Formed
from persample.sources.backends.contributions import Contribution
from persample.sources.backends.shortcuts import (
    gram,
    moments_and_norms,
    numbers_held,
    pieces_of,
    squared_norms,
    weighted_sum,
)


class Origin(Protocol):
    """Turns the gradient by an operand into the gradients of the parameters that it was computed from."""

    def pull(self, gradient: Tensor) -> Mapping[str, Tensor]:
        """Return the gradients of the parameters, by name."""

    def pull_rows(self, gradients: Tensor) -> Mapping[str, Tensor]:
        """Return them for several samples, in dim 0."""


class Itself:
    """The origin of an operand that is a parameter itself.

    Args:
        name: of the parameter.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def pull(self, gradient: Tensor) -> Mapping[str, Tensor]:
        return {self._name: gradient}

    def pull_rows(self, gradients: Tensor) -> Mapping[str, Tensor]:
        return {self._name: gradients}


@dataclass(frozen=True)
class SingleUse(Block):
    """The gradients of a parameter that is used once, by an operand that holds each of its entries at most once.

    Attributes:
        contribution: to the operand.
        origin: takes the entries of the operand to their places in the parameter.
        width: how many numbers the gradient of the operand has.
    """

    contribution: Contribution
    origin: Origin
    width: int

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        for where, g in pieces_of(self.contribution, self.size, self.width):
            yield where, self.origin.pull_rows(g)[self.name]

    def compute_sums(self) -> tuple[Tensor, Tensor]:
        total, squares = self.contribution.sums()
        return self.origin.pull(total)[self.name], self.origin.pull(squares)[self.name]

    def compute_squared_norms(self) -> Tensor:
        return squared_norms(self.contribution, self.size, self.width)

    def compute_moments_and_norms(self) -> tuple[Tensor, Tensor, Tensor]:
        total, squares, norms = moments_and_norms(self.contribution, self.size, self.width)
        return self.origin.pull(total)[self.name], self.origin.pull(squares)[self.name], norms

    def to_keep(self) -> Block:
        if self.size * self.width > numbers_held(self.contribution):
            return self
        rows = self.origin.pull_rows(self.contribution.per_sample())[self.name]
        return Formed(self.name, self.start, self.size, rows)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return self.origin.pull(weighted_sum(self.contribution, weights, self.width))[self.name]

    def gram(self) -> Tensor:
        return gram(self.contribution, self.size, self.width)


@dataclass(frozen=True)
class SeveralUses(Block):
    """The gradients of a parameter with several uses, or with one use that is not entry by entry.

    All uses are added up for each sample before anything is made of it, so that the cross terms are there.

    Attributes:
        uses: what each contributes, and to what.
        width: how many numbers are made of each sample.
        parameter: the parameter.
    """

    uses: Sequence[tuple[Origin, Contribution]]
    width: int
    parameter: Tensor

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        rows = max(1, 2**20 // max(1, self.width))
        for start in range(0, self.size, rows):
            where = slice(start, min(self.size, start + rows))
            pulled = [origin.pull_rows(contribution.take(where).per_sample()) for origin, contribution in self.uses]
            yield where, self._added_up(pulled, where.stop - start)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        pulled = [origin.pull(weighted_sum(contribution, weights, self.width)) for origin, contribution in self.uses]
        return self._added_up(pulled)

    def _added_up(self, pulled: Iterable[Mapping[str, Tensor]], *leading: int) -> Tensor:
        """Return the sum; zeros if the backward pass did not reach the parameter."""
        found = [gradients[self.name] for gradients in pulled if self.name in gradients]
        if found:
            return reduce(torch.add, found)
        return at_least_float32(self.parameter.new_zeros((*leading, *self.parameter.shape)))
