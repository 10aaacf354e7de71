"""The ways to split a part of a batch into samples."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence
from torch.utils import _pytree as pytree

from persample.errors import UnsupportedModelError
from persample.sources.model.detached_inputs import entering
from persample.sources.model.refusals import FUSED_OR_VJP
from persample.sources.splits.objects import with_fields
from persample.sources.splits.tree import (
    Column,
    Columns,
    Followed,
    Index,
    Split,
    Take,
    TensorFunction,
    column_of,
    columns_of,
    followed_in,
    kind_of,
    leaves_of,
    map_tensors,
    plain,
    sizes_of,
    take_samples,
    tensors_in,
)


@dataclass(frozen=True, eq=False)
class Shared(Split):
    """A part shared by all samples: see `shared`."""

    tree: Any

    @property
    def value(self) -> Any:
        return plain(self.tree)

    def sizes(self, where: str) -> Iterator[tuple[str, int]]:
        return iter(())

    def take(self, index: Index, take: Take) -> Split:
        return self

    def map(self, function: TensorFunction) -> Split:
        return Shared(map_tensors(function, self.tree))

    def followed(self) -> Iterator[Followed]:
        return (Followed(tensor, None) for tensor in tensors_in(self.tree))

    def kind(self) -> Hashable:
        return "shared", kind_of(self.tree)

    def columns(self, where: str) -> Columns:
        columns = [Column(tensor, tensor, None) for tensor in tensors_in(self.tree)]
        return columns, lambda entries: plain(_with_tensors(self.tree, entries))


@dataclass(frozen=True, eq=False)
class Batched(Split):
    """A part whose samples are in another dimension than 0: see `batched`."""

    tree: Any
    dim: int

    @property
    def value(self) -> Any:
        return plain(self.tree)

    def sizes(self, where: str) -> Iterator[tuple[str, int]]:
        return ((where, tensor.shape[self.dim]) for tensor in tensors_in(self.tree))

    def take(self, index: Index, take: Take) -> Split:
        def taken(tensor: Tensor) -> Tensor:
            part = take(tensor, self.dim % tensor.dim())
            return part.contiguous() if tensor.is_contiguous() else part  # cuDNN refuses first states with gaps

        return self.map(taken)

    def map(self, function: TensorFunction) -> Split:
        return Batched(map_tensors(function, self.tree), self.dim)

    def followed(self) -> Iterator[Followed]:
        return (Followed(tensor, self.dim % tensor.dim()) for tensor in tensors_in(self.tree))

    def kind(self) -> Hashable:
        return "batched", self.dim, kind_of(self.tree)

    def columns(self, where: str) -> Columns:
        columns = [column_of(tensor, self.dim % tensor.dim()) for tensor in tensors_in(self.tree)]
        return columns, lambda entries: plain(_with_tensors(self.tree, entries))


@dataclass(frozen=True, eq=False)
class Entries(Split):
    """A list with one entry for each sample: see `one_per_sample`.

    Attributes:
        entries: the samples.
        guessed: whether nobody said that it is such a list.
    """

    entries: list[Any]
    guessed: bool = False

    @property
    def value(self) -> Any:
        return [plain(entry) for entry in self.entries]

    def sizes(self, where: str) -> Iterator[tuple[str, int]]:
        yield where, len(self.entries)

    def take(self, index: Index, take: Take) -> Split:
        chosen = self.entries[index] if isinstance(index, slice) else [self.entries[i] for i in index]
        return Entries(chosen, self.guessed)

    def map(self, function: TensorFunction) -> Split:
        return Entries([map_tensors(function, entry) for entry in self.entries], self.guessed)

    def followed(self) -> Iterator[Followed]:
        for i, entry in enumerate(self.entries):
            for tensor in tensors_in(entry):
                yield Followed(tensor, None, torch.tensor([i], device=tensor.device))

    def kind(self) -> Hashable:
        return "entries", frozenset(kind_of(entry, other=type) for entry in self.entries)

    def columns(self, where: str) -> Columns:
        entries = [pytree.tree_flatten(plain(entry)) for entry in self.entries]
        first, structure = entries[0]
        if any(_alike(leaves) != _alike(first) or spec != structure for leaves, spec in entries):
            raise UnsupportedModelError(
                f"The entries of the list {where} have different shapes, or hold other things than tensors, so "
                f"torch.func cannot map over them: pad them to one length, or {FUSED_OR_VJP}."
            )
        same = zip(*(leaves for leaves, _ in entries), strict=True)
        columns = [Column(leaves[0], torch.stack(leaves), 0) for leaves in same if isinstance(leaves[0], Tensor)]
        return columns, lambda entries: [_with_tensors(pytree.tree_unflatten(first, structure), entries)]


@dataclass(frozen=True, eq=False)
class Packed(Split):
    """A packed batch of sequences, or a tensor with an entry for each of its steps, in the same order.

    Attributes:
        packed: the sequences.
        whole: whether the model gets them as such; else their entries alone.
    """

    packed: PackedSequence
    whole: bool = True

    @property
    def value(self) -> Any:
        return self.packed if self.whole else self.packed.data

    def sizes(self, where: str) -> Iterator[tuple[str, int]]:
        yield where, int(self.packed.batch_sizes[0])

    def take(self, index: Index, take: Take) -> Split:
        sequences = unpack_sequence(self.packed)
        chosen = sequences[index] if isinstance(index, slice) else [sequences[i] for i in index]
        with torch.device("cpu"):  # where the lengths must be, whatever the default device is
            packed = pack_sequence(chosen, enforce_sorted=False)
        return Packed(packed._replace(data=entering(lambda _: packed.data)(self.packed.data)), self.whole)

    def map(self, function: TensorFunction) -> Split:
        return Packed(self.packed._replace(data=function(self.packed.data)), self.whole)

    def followed(self) -> Iterator[Followed]:
        size = int(self.packed.batch_sizes[0])
        order = self.packed.sorted_indices
        order = torch.arange(size, device=self.packed.data.device) if order is None else order
        yield Followed(self.packed.data, 0, torch.cat([order[:count] for count in self.packed.batch_sizes.tolist()]))

    def kind(self) -> Hashable:
        return "packed", self.whole, kind_of(self.packed.data)

    def columns(self, where: str) -> Columns:
        raise UnsupportedModelError(
            f"{where} is a PackedSequence, which torch.func cannot map over: pass padded tensors, or {FUSED_OR_VJP}."
        )


@dataclass(frozen=True, eq=False)
class Fields(Split):
    """A dataclass, or a mapping other than dict (UserDict, BatchFeature).

    Attributes:
        original: the object.
        fields: what it holds, by name; parts that are split otherwise are `Split`s themselves.
    """

    original: Any
    fields: dict[str, Any]

    @property
    def value(self) -> Any:
        return with_fields(self.original, plain(self.fields))

    def sizes(self, where: str) -> Iterator[tuple[str, int]]:
        for path, leaf in leaves_of(where, self.fields):
            yield from sizes_of(path, leaf)

    def take(self, index: Index, take: Take) -> Split:
        return Fields(self.original, take_samples(self.fields, index, take))

    def map(self, function: TensorFunction) -> Split:
        return Fields(self.original, map_tensors(function, self.fields))

    def followed(self) -> Iterator[Followed]:
        return followed_in(self.fields)

    def kind(self) -> Hashable:
        return type(self.original), kind_of(self.fields)

    def columns(self, where: str) -> Columns:
        columns, sample = columns_of(where, self.fields)
        return columns, lambda entries: with_fields(self.original, sample(entries))


def _with_tensors(tree: Any, tensors: list[Tensor]) -> Any:
    """Return `tree` with its tensors replaced."""
    left = iter(tensors)
    return map_tensors(lambda _: next(left), tree)


def _alike(leaves: list[Any]) -> list[Any]:
    """A key that is equal for leaves that can be stacked, or shared."""
    settings = bool | int | float | str | None
    return [
        (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf if isinstance(leaf, settings) else object()
        for leaf in leaves
    ]
