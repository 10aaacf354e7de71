"""What a quantity is: the two steps by which a source asks for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from persample.quantities.block import Block

Result = TypeVar("Result", covariant=True)


@dataclass(frozen=True)
class Setting:
    """What a quantity is taken of.

    Attributes:
        size: how many gradients there are: B, or the number of groups of samples.
        parameters: the parameters by name, detached, in the order of the results.
    """

    size: int
    parameters: Mapping[str, Tensor]

    def zeros(self, *shape: int) -> Tensor:
        """Return zeros to add to, in the most precise dtype of the parameters, at least float32, on their device."""
        dtype = reduce(torch.promote_types, [p.dtype for p in self.parameters.values()], torch.float32)
        device = next((p.device for p in self.parameters.values()), None)
        return torch.zeros(shape, dtype=dtype, device=device)


class Accumulation(ABC, Generic[Result]):
    """Reads the blocks of one batch: in a round, the gradient of each sample by each parameter comes once.

    Attributes:
        rereads: whether it wants more than one round also where each parameter comes as one block, so that these are
            to be kept until the end. What sets it to False for its last round lets them go one by one.
        reads: which of the methods `"sums"` and `"squared_norms"` of blocks it calls. Where both are called, by this or
            by another quantity, they are computed together.
    """

    rereads: bool = False
    reads: Collection[str] = ()

    @abstractmethod
    def add(self, block: Block) -> None:
        """Take the gradients of some samples by one parameter."""

    def another_round(self) -> bool:
        """Whether all blocks are wanted once more, in the same order; asked when all have been taken."""
        return False

    @abstractmethod
    def result(self) -> Result:
        """Return the quantity."""


class Quantity(Protocol[Result]):
    """Something that can be said of the gradients of the single samples of a batch.

    The self-check compares the quantity of a few samples with that of gradients which a loop computed. A quantity that
    holds something for each sample of the batch has a method `of_size(size)`, too, which returns it for fewer.
    """

    @property
    def name(self) -> str:
        """The field of the result, where it is not given by position."""

    def begin(self, setting: Setting) -> Accumulation[Result]:
        """Return what reads the blocks of one batch."""
