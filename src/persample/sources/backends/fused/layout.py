"""Where the samples are in a tensor.

A tensor that depends on the batch holds the samples along some dimension, perhaps folded together with others. In
row-major order the entry with linear index n belongs to row (n // inner) mod rows, so three numbers say it all:

    numel = outer · rows · inner

A batch-first tensor has outer = 1; a time-first one, (T, B, D), has outer = T and inner = D; one of folded heads,
(B·H, T, D), has outer = 1 and inner = H·T·D. A reshape changes none of them. Usually row i is sample i. Where rows
were picked, sorted or packed, their owners are known one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from persample.sources.backends.fused.axis import Axis
from persample.sources.backends.fused.owners import NOBODY, Owners

Write = Callable[[Tensor], Tensor]


class Layout(NamedTuple):
    """Where the samples are in a tensor of `outer · rows · inner` entries in row-major order.

    Attributes:
        outer: number of entries before the rows.
        batch: B, the number of samples.
        inner: number of entries behind the rows.
        owners: whose the rows are; None where row i is sample i.
    """

    outer: int
    batch: int
    inner: int
    owners: Owners | None = None

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.batch if self.owners is None else len(self.owners.labels)

    @property
    def complete(self) -> bool:
        """Whether every row belongs to a sample."""
        return self.owners is None or self.owners.complete

    def sample_first(self, x: Tensor, features: int) -> Tensor:
        """Return `x` as `(B, L, F)`, with F = `features` trailing entries and all else of a sample as positions.

        Where samples have different numbers of positions, zeros fill up.

        Raises:
            ValueError: the samples are folded into the features.
        """
        self.require_features(features)
        positions = self.inner // features
        if self.outer == 1:
            parts = x.reshape(self.rows, positions, features)
        else:
            parts = x.reshape(self.outer, self.rows, positions, features).transpose(0, 1).flatten(1, 2)
        return parts if self.owners is None else self.owners.gather(parts)

    def require_features(self, *features: int) -> None:
        """Raise `ValueError` unless trailing entries can be grouped by that number."""
        if 0 in features:
            raise ValueError("it has no features")
        if self.inner % features[0]:
            raise ValueError("the samples are not in the leading dimensions")

    def with_features(self, before: int, after: int) -> Layout:
        """Return the layout after the trailing `before` features became `after`."""
        return self._replace(inner=self.inner // before * after)

    def axis(self, shape: Sequence[int]) -> Axis | None:
        """Return the dimension of `shape` that holds the rows, or None if no single one does."""
        if 0 in shape:
            return None
        before = 1
        for index, size in enumerate(shape):
            after = math.prod(shape[index + 1 :])
            if self.outer % before == 0 and self.inner % after == 0:
                folded_before, folded_after = self.outer // before, self.inner // after
                if size == folded_before * self.rows * folded_after:
                    return Axis(index, folded_before, folded_after)
            before *= size
        return None

    def at(self, axis: Axis, shape: Sequence[int]) -> Layout:
        """Return the layout of a tensor of `shape` with the rows of this one in `axis`."""
        before, after = math.prod(shape[: axis.dim]), math.prod(shape[axis.dim + 1 :])
        return Layout(before * axis.before, self.batch, after * axis.after, self.owners)

    def by_sample(self, x: Tensor, axis: Axis) -> Tensor:
        """Return `x`, which holds the rows in `axis`, as `(B, L, *others)`; the other dimensions keep their order."""
        moved = x.movedim(axis.dim, 0)
        if axis.folded == 1:
            rows = moved.unsqueeze(1)
        else:
            parts = moved.reshape(axis.before, self.rows, axis.after, *moved.shape[1:])
            rows = parts.transpose(0, 1).flatten(1, 2)
        return rows if self.owners is None else self.owners.gather(rows)

    def row_labels(self, device: torch.device) -> Tensor:
        """Return the sample that each row belongs to, shape `(rows,)`."""
        return torch.arange(self.batch, device=device) if self.owners is None else self.owners.labels

    def labels(self, shape: Sequence[int], device: torch.device, write: Write = lambda rows: rows) -> Tensor:
        """Return the owner of each entry of a tensor of `shape`, as a tensor of that shape, coded as by `write`."""
        rows = write(self.row_labels(device))
        axis = self.axis(shape)
        if axis is None:
            return rows.view(1, -1, 1).expand(self.outer, -1, self.inner).reshape(tuple(shape))
        # An expanded vector, so that views of the labels cost nothing.
        along = rows.view(1, -1, 1).expand(axis.before, -1, axis.after).reshape(-1)
        return along.view([-1 if d == axis.dim else 1 for d in range(len(shape))]).expand(tuple(shape))


def layout_of(x: Tensor, dim: int | None, labels: Tensor | None, batch: int) -> Layout:
    """Return the layout of a tensor of the batch.

    Args:
        x: the tensor.
        dim: the dimension along which the samples are; None if all of it belongs to one.
        labels: the samples to which the entries along `dim` belong; None if these are the samples in order.
        batch: B.
    """
    owners = None if labels is None else Owners(labels, batch)
    if dim is None:
        return Layout(1, batch, x.numel(), owners)
    return Layout(math.prod(x.shape[:dim]), batch, math.prod(x.shape[dim + 1 :]), owners)


def rows_in(labels: Tensor) -> tuple[int, Tensor, int]:
    """Return the entries of `labels`, which may not be empty, as (outer, rows, inner) with as few rows as possible."""
    shape = labels.shape
    # Behind the rows stand the trailing dimensions along which nothing changes, before them the leading ones.
    last = len(shape)
    while last > 0 and _constant(labels, last - 1):
        last -= 1
    first = 0
    while first < last and _constant(labels, first):
        first += 1
    rows = labels[(0,) * first + (slice(None),) * (last - first) + (0,) * (len(shape) - last)]
    return math.prod(shape[:first]), rows.reshape(-1), math.prod(shape[last:])


def without_gaps(labels: Tensor, likely: Sequence[int]) -> Tensor:
    """Return `labels`, with unowned entries assigned to the sample that owns all others of their row.

    Strides of a transposed convolution, paddings and diagonals leave such gaps between the entries of a sample. Were a
    gap given to a sample whose loss does not depend on it, then the samples would meet later on, and be refused.

    Args:
        labels: whose the entries are.
        likely: the dimensions to begin with.
    """
    dims = range(labels.dim())
    for dim in dict.fromkeys([d for d in likely if d in dims] + list(dims)):
        owner = labels.amax([d for d in dims if d != dim], keepdim=True) if len(dims) > 1 else labels
        if bool(((labels == owner) | (labels == NOBODY)).all()):
            return owner.expand_as(labels)
    return labels


def of_rows(outer: int, rows: Tensor, inner: int, batch: int) -> Layout:
    """Return the layout of a tensor of outer · rows · inner entries, whose rows have the owners `rows`.

    Rows that belong to nobody, such as padding, are given to the samples beside whose rows they are, if all other
    rows say that the samples come in turn.
    """
    found = [after for after in _distances(rows, batch) if _in_turn(rows, after, batch)]
    if len(found) == 1:
        return Layout(outer * (len(rows) // (found[0] * batch)), batch, found[0] * inner)
    return Layout(outer, batch, inner, Owners(rows.clone(), batch))


def _distances(rows: Tensor, batch: int) -> Iterator[int]:
    """Yield the candidate numbers of adjacent rows per sample."""
    if bool((rows != NOBODY).all()):
        changes = (rows[1:] != rows[:-1]).nonzero()
        yield int(changes[0]) + 1 if len(changes) else len(rows)
    elif len(rows) % batch == 0:
        yield from (after for after in range(1, len(rows) // batch + 1) if len(rows) // batch % after == 0)


def _in_turn(rows: Tensor, after: int, batch: int) -> bool:
    if len(rows) % (after * batch):
        return False
    turns = rows.view(-1, batch, after)
    due = torch.arange(batch, device=rows.device).view(-1, 1)
    return bool(((turns == due) | (turns == NOBODY)).all())


def _constant(labels: Tensor, dim: int) -> bool:
    return labels.shape[dim] <= 1 or labels.stride(dim) == 0 or bool((labels == labels.narrow(dim, 0, 1)).all())
