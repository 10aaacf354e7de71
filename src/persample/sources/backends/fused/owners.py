"""Owners of rows that are not simply the samples 0, 1, 2, …: selected, sorted or packed rows."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

# Owners of an entry that are no sample.
NOBODY = -1  # it belongs to none, such as padding
SEVERAL = -2  # it depends on several samples
ALL = -3  # it depends on all of them


class Owners:
    """The sample to which each row belongs.

    Args:
        labels: the samples, or `NOBODY`; shape `(rows,)`.
        batch: B.
    """

    def __init__(self, labels: Tensor, batch: int) -> None:
        self.labels = labels
        self.batch = batch

    def __eq__(self, other: object) -> bool:
        """Whether the rows belong to the same samples."""
        if self is other or not isinstance(other, Owners):
            return self is other
        known = self.labels, other.labels
        return self.batch == other.batch and known[0].device == known[1].device and torch.equal(*known)

    def __hash__(self) -> int:
        return hash((self.batch, len(self.labels)))

    def bind(self, labels: Tensor) -> None:
        """Assign the rows to `labels`, which must agree with the owners known so far."""
        self.labels = labels
        for name in ("complete", "one", "most", "slots"):
            self.__dict__.pop(name, None)

    @cached_property
    def complete(self) -> bool:
        """Whether every row belongs to a sample."""
        return not bool((self.labels == NOBODY).any())

    @cached_property
    def one(self) -> Tensor:
        """The samples that own rows, each once."""
        return self.labels if len(self.labels) == 1 else self.labels.unique()

    @cached_property
    def most(self) -> int:
        """K, the largest number of rows that a sample has."""
        return int(self.labels.bincount(minlength=self.batch).max())

    @cached_property
    def slots(self) -> Tensor:
        """The slot of each row among the K slots of its sample, shape `(rows,)`."""
        order = self.labels.argsort(stable=True)
        owner = self.labels[order]
        start = owner.bincount(minlength=self.batch).cumsum(0).roll(1)
        start[0] = 0
        slots = torch.empty_like(order)
        slots[order] = owner * self.most + torch.arange(len(order), device=order.device) - start[owner]
        return slots

    def gather(self, rows: Tensor) -> Tensor:
        """Return `(rows, L, *others)` as `(B, K·L, *others)`, padded with zeros."""
        slots = rows.new_zeros(self.batch * self.most, *rows.shape[1:]).index_copy(0, self.slots, rows)
        return slots.view(self.batch, self.most * rows.shape[1], *rows.shape[2:])
