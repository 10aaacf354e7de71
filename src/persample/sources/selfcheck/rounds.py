"""Quantities of one batch: the blocks of its gradients, read by all that want them, as often as they want them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from persample.dtypes import at_least_float32, without_autocast
from persample.errors import ContractError, UnsupportedModelError
from persample.quantities.block import Block, Formed, Grouped
from persample.quantities.computed import Quantities
from persample.quantities.protocol import Accumulation, Quantity, Setting
from persample.sources.batch import Batch
from persample.sources.contract import Contract, Receive
from persample.sources.model.random_state import random_state, same_random_state
from persample.sources.selfcheck.returned import per_sample_of, require_losses

#: As many bytes of per-sample gradients as a backend without a shorter way forms at once.
MAX_BYTES = 2**28


@dataclass(frozen=True)
class QuantitiesOf:
    """What `source.compute` asks for, as a function of source and batch.

    Attributes:
        asked: the quantities.
        groups: for each sample the group to which it belongs, whole numbers on the CPU; None if each stands alone.
        max_bytes: as many bytes of per-sample gradients may be formed at once, by backends that form them.
    """

    asked: Sequence[Quantity[Any]]
    groups: Tensor | None = None
    max_bytes: int = MAX_BYTES

    @property
    def __name__(self) -> str:
        """What tells one kind of request from another."""
        return f"compute {[type(quantity).__qualname__ for quantity in self.asked]} {self.groups is not None}"

    def __call__(self, source: Contract, batch: Batch) -> Quantities:
        if self.groups is None:
            losses, results = self._results(source, batch, batch.size)
            return Quantities(losses, self.asked, results)
        order = self.groups.argsort(stable=True)
        numbers, index = self.groups[order].unique_consecutive(return_inverse=True)
        in_order = torch.arange(batch.size, device="cpu")
        ordered = batch if torch.equal(order, in_order) else batch.take(order.tolist())
        losses, results = self._results(source, ordered, len(numbers), index)
        back = torch.empty_like(order).scatter_(0, order, in_order)
        return Quantities(losses[back.to(losses.device)], self.asked, results, numbers)

    def _results(
        self, source: Contract, batch: Batch, size: int, index: Tensor | None = None
    ) -> tuple[Tensor, list[Any]]:
        setting = Setting(size, {name: p.detach() for name, p in source.parameters().items()})
        accumulations = [quantity.begin(setting) for quantity in self.asked]
        device = next((p.device for p in source.model.parameters()), torch.device("cpu"))
        whole = source.samples_at_once(batch, self.max_bytes) >= batch.size
        keep = whole and any(accumulation.rereads for accumulation in accumulations)
        kept: list[Block] = []

        def receive(block: Block) -> None:
            if keep:
                kept.append(block)
            _give(block, accumulations, device)

        index = None if index is None else index.to(device)
        losses = _blocks_of(source, batch, self.max_bytes, receive, index)
        wanting = [accumulation for accumulation in accumulations if accumulation.another_round()]
        while wanting:
            if whole and not keep:
                raise ContractError(
                    f"{type(wanting[0]).__name__} wants to read the gradients once more, for which they are kept only "
                    "if its attribute rereads is true: set it."
                )
            if keep:
                with source.reading_blocks():
                    for block in kept:
                        _give(block, wanting, device)
            else:
                _blocks_of(source, batch, self.max_bytes, lambda block: _give(block, wanting, device), index)  # noqa: B023
            wanting = [accumulation for accumulation in wanting if accumulation.another_round()]
        return losses, [accumulation.result() for accumulation in accumulations]


def formed_blocks(source: Contract, batch: Batch, receive: Receive, max_bytes: int) -> Tensor:
    """Give `receive` the blocks of `batch` from per-sample gradients, of which no more are formed at once than allowed.

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
                f"max_bytes={max_bytes}, so that they are computed {rows} samples at a time, which would draw others "
                "than the batch does: allow more bytes, use backend 'fused' or 'hooks', which need none of them, or "
                "call model.eval()."
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
    """Return how many samples of `batch` have per-sample gradients of no more than `max_bytes` together."""
    parameters = source.parameters().values()
    of_one = sum(p.numel() * max(4, p.element_size()) for p in parameters)
    return min(batch.size, max(1, max_bytes // max(1, of_one)))


def _receive_formed(gradients: dict[str, Tensor], start: int, receive: Receive) -> None:
    for name, g in gradients.items():
        receive(Formed(name, start, len(g), at_least_float32(g)))


def _give(block: Block, accumulations: Sequence[Accumulation[Any]], device: torch.device) -> None:
    with without_autocast(device):
        for accumulation in accumulations:
            accumulation.add(block)


def _blocks_of(source: Contract, batch: Batch, max_bytes: int, receive: Receive, index: Tensor | None) -> Tensor:
    """Let the source give `receive` its blocks, added up within the groups whose numbers are in `index`."""
    if index is not None:
        receive = _AddingUp(index, receive)
    losses = source.compute_blocks(batch, receive, max_bytes)
    require_losses(source, losses, batch.size)
    return losses


class _AddingUp:
    """Adds gradients up within groups of samples that follow each other, and gives the sums on.

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
        if block.size == len(self._index):
            self._receive(Grouped(block.name, 0, last + 1, block, index))
            return
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
