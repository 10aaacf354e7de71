"""Quantities of one batch: rounds in which they read the blocks of its gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from persample.dtypes import at_least_float32, without_autocast
from persample.errors import ContractError, UnsupportedModelError
from persample.quantities.block import AT_ONCE, Block, Formed, Grouped, Scaled
from persample.quantities.computed import Quantities
from persample.quantities.groups import Groups
from persample.quantities.protocol import Quantity, Setting
from persample.sources.batch import Batch
from persample.sources.contract import Contract, Receive
from persample.sources.model.random_state import random_state, same_random_state
from persample.sources.selfcheck.quantity_code import QuantityCode
from persample.sources.selfcheck.returned import per_sample_of, require_losses

#: As many bytes of per-sample gradients as a backend without a shorter way forms at once.
MAX_BYTES = 2**28


@dataclass(frozen=True)
class QuantitiesOf:
    """A request of `source.compute`, as a function of source and batch.

    Attributes:
        asked: the quantities.
        groups: those of the samples; None if each stands alone.
        max_bytes: as many bytes of per-sample gradients may be formed at once, by backends that form them.
        factor: by what the gradients are multiplied before anything is made of them.
    """

    asked: Sequence[Quantity[Any]]
    groups: Groups | None = None
    max_bytes: int = MAX_BYTES
    factor: float = 1.0

    @property
    def __name__(self) -> str:
        """Identifies the kind of request."""
        return f"compute {[type(quantity).__qualname__ for quantity in self.asked]} {self.groups is not None}"

    def __call__(self, source: Contract, batch: Batch) -> Quantities:
        if self.groups is None:
            if self.factor == 1:
                losses, results = source.compute_quantities(batch, self.asked, self._of_blocks)
            else:
                losses, results = self._results(source, batch)
            return Quantities(losses, self.asked, results)
        if not self._must_be_in_order(source, batch, self.groups):
            losses, results = self._results(source, batch)
            return Quantities(losses, self.asked, results, self.groups.numbers)
        order, before = self.groups.index.argsort(stable=True), random_state(source.model)
        in_order = replace(self, groups=self.groups.take(order))
        losses, results = in_order._results(source, batch.take(order.tolist()))
        if source.ordinary_random_stream and not same_random_state(before, random_state(source.model)):
            raise UnsupportedModelError(
                "The model draws random numbers (dropout), and to add up large gradients within groups the samples are "
                "put in the order of their groups, where they would draw others: sort the batch by groups, or call "
                "model.eval()."
            )
        losses = torch.empty_like(losses).index_copy_(0, order.to(losses.device), losses)
        return Quantities(losses, self.asked, results, self.groups.numbers)

    def _must_be_in_order(self, source: Contract, batch: Batch, groups: Groups) -> bool:
        """Whether the samples of a group must follow each other; else their sums are all held at once."""
        if groups.are_in_order():
            return False
        largest = max((p.numel() for p in source.parameters().values()), default=0)
        at_once = len(groups) * largest <= AT_ONCE
        return not at_once or source.samples_at_once(batch, self.max_bytes) < batch.size

    def _of_blocks(self, source: Contract, batch: Batch, asked: Sequence[Quantity[Any]]) -> tuple[Tensor, list[Any]]:
        return replace(self, asked=asked)._results(source, batch)

    def _results(self, source: Contract, batch: Batch) -> tuple[Tensor, list[Any]]:
        whole = source.samples_at_once(batch, self.max_bytes) >= batch.size
        parameters, groups = source.parameters(), self.groups
        size = batch.size if groups is None else len(groups)
        reading = Reading(
            self.asked, parameters, size, kept=whole, factor=self.factor, groups=groups if whole else None
        )
        index = None if whole or groups is None else groups.index.to(reading.device)

        def blocks_once_more(receive: Receive) -> None:
            if not whole:
                _blocks_of(source, batch, self.max_bytes, receive, index)
                return
            with source.reading_blocks():
                reading.reread(receive)

        losses = _blocks_of(source, batch, self.max_bytes, reading.receive, index)
        return losses, reading.results(blocks_once_more)


class Reading:
    """Blocks of the gradients of one batch, on their way to all quantities that are asked for.

    Args:
        asked: the quantities.
        parameters: by name.
        size: how many gradients there are by each, or sums of them.
        kept: whether blocks are to be kept where a quantity needs them again; otherwise they will come again.
        factor: by what the gradients are multiplied first.
        groups: over which those of blocks of all samples are added up first; None to take them as they come.
        sums: whether to add up the gradients in the blocks, and their squares, too.

    Attributes:
        total, squares: these sums, by parameter.
    """

    def __init__(
        self,
        asked: Sequence[Quantity[Any]],
        parameters: Mapping[str, Tensor],
        size: int,
        *,
        kept: bool = True,
        factor: float = 1.0,
        groups: Groups | None = None,
        sums: bool = False,
    ) -> None:
        setting = Setting(size, {name: p.detach() for name, p in parameters.items()})
        self._size = setting.size
        self.device = next((p.device for p in parameters.values()), torch.device("cpu"))
        self._accumulations = self._wanting = [QuantityCode(quantity, setting) for quantity in asked]
        self._keeps = kept and any(accumulation.rereads for accumulation in self._accumulations)
        self._never_again = kept and not self._keeps
        reads = {each for a in self._accumulations for each in a.reads}
        self._index = None if groups is None else groups.index.to(self.device)
        self._reads_both = {"sums", "squared_norms"} <= reads | ({"sums"} if sums and groups is None else set())
        self._kept: list[Block] = []
        self._factor = factor
        self._adds_up = sums
        self.total: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}

    def receive(self, block: Block) -> None:
        """Take a block of the first round."""
        with without_autocast(self.device):
            if self._index is not None:
                self._add_up(block)
                block = Grouped(block.name, 0, self._size, block, self._index)
            if self._keeps:
                block = block.to_keep()
                self._kept.append(block)
            if self._reads_both:
                block.prepare_moments_and_norms()
            if self._index is None:
                self._add_up(block)
        self._give(block)

    def _add_up(self, block: Block) -> None:
        if self._adds_up:
            self.total[block.name], self.squares[block.name] = block.sums()

    def reread(self, receive: Receive) -> None:
        """Give `receive` the blocks that were kept; if for the last time, each is let go after that."""
        if any(accumulation.rereads for accumulation in self._wanting):
            for block in self._kept:
                receive(block)
            return
        self._never_again = True
        self._kept.reverse()
        while self._kept:
            receive(self._kept.pop())

    def results(self, blocks_once_more: Callable[[Receive], None] | None = None) -> list[Any]:
        """Return the quantities, after as many further rounds as they want.

        Args:
            blocks_once_more: gives what it is passed all blocks; those that were kept if None.

        Raises:
            ContractError: a quantity wants another round, and has not said so before the first.
        """
        again = self.reread if blocks_once_more is None else blocks_once_more
        self._wanting = [accumulation for accumulation in self._wanting if accumulation.another_round()]
        while self._wanting:
            if self._never_again:
                raise ContractError(
                    f"{type(self._wanting[0].accumulation).__name__} wants to read the gradients once more, for which "
                    "they are kept only if its attribute rereads is true: set it."
                )
            again(self._give)
            self._wanting = [accumulation for accumulation in self._wanting if accumulation.another_round()]
        return [accumulation.result() for accumulation in self._accumulations]

    def _give(self, block: Block) -> None:
        if self._factor != 1:
            block = Scaled(block.name, block.start, block.size, block, self._factor)
        with without_autocast(self.device):
            for accumulation in self._wanting:
                accumulation.add(block)


def formed_blocks(source: Contract, batch: Batch, receive: Receive, max_bytes: int) -> Tensor:
    """Pass `receive` the blocks of `batch` from per-sample gradients, formed in chunks of at most `max_bytes`.

    Of a model that keeps a state, each part of the batch begins with the same, and that of one ordinary forward pass
    over the batch is left.

    Raises:
        UnsupportedModelError: the forward pass draws random numbers, and the batch is computed in several parts.
    """
    rows = source.samples_at_once(batch, max_bytes)
    if rows >= batch.size:
        losses, gradients = per_sample_of(source, batch)
        _receive_formed(gradients, 0, receive)
        return losses
    before, state = random_state(source.model), source.state()
    found, changed = [], False
    for start in range(0, batch.size, rows):
        losses, gradients = per_sample_of(source, batch.take(slice(start, start + rows)))
        if not same_random_state(before, random_state(source.model)):
            raise UnsupportedModelError(
                f"The model draws random numbers (dropout), and the gradients of {batch.size} samples take more than "
                f"max_bytes={max_bytes}. Computing them {rows} samples at a time would draw different numbers: raise "
                "max_bytes, use backend 'fused' or 'hooks', which do not need it, or call model.eval()."
            )
        changed |= source.state_changed(state)
        state.put_back()
        found.append(losses)
        _receive_formed(gradients, start, receive)
        del gradients
    if changed:
        source.losses(batch)
    return torch.cat(found)


def samples_within(source: Contract, batch: Batch, max_bytes: int) -> int:
    """Return how many samples' gradients fit in `max_bytes`."""
    parameters = source.parameters().values()
    of_one = sum(p.numel() * max(4, p.element_size()) for p in parameters)
    return min(batch.size, max(1, max_bytes // max(1, of_one)))


def _receive_formed(gradients: dict[str, Tensor], start: int, receive: Receive) -> None:
    for name, g in gradients.items():
        receive(Formed(name, start, len(g), at_least_float32(g)))


def _blocks_of(source: Contract, batch: Batch, max_bytes: int, receive: Receive, index: Tensor | None) -> Tensor:
    """Let the source pass its blocks to `receive`, summed within the groups numbered by `index`."""
    if index is not None:
        receive = _AddingUp(index, receive)
    losses = source.compute_blocks(batch, receive, max_bytes)
    require_losses(source, losses, batch.size)
    return losses


class _AddingUp:
    """Sums gradients within groups of consecutive samples, and passes the sums on.

    Args:
        index: the number of each sample's group, ascending from 0.
        receive: gets the blocks of sums.
    """

    def __init__(self, index: Tensor, receive: Receive) -> None:
        self._index, self._receive = index, receive
        self._pending: dict[str, tuple[int, Tensor]] = {}  # groups that may go on, and their sums so far

    def __call__(self, block: Block) -> None:
        index = self._index[block.samples]
        first, last = int(index[0]), int(index[-1])
        sums = Grouped(block.name, first, last + 1 - first, block, index - first).formed()
        if block.name in self._pending:
            pending, total = self._pending.pop(block.name)
            if pending == first:
                sums[:1] += total
            else:
                sums, first = torch.cat([total, sums]), pending
        done = last if block.start + block.size < len(self._index) else last + 1
        if done == last:
            self._pending[block.name] = last, sums[-1:].clone()
        if done > first:
            self._receive(Formed(block.name, first, done - first, sums[: done - first]))
