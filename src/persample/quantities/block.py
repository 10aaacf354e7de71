"""`Block`: the gradients of some samples by one parameter, a matrix that is formed only where somebody asks for it.

Backends make blocks, quantities read them. A backend that knows a shorter way to a sum, a norm or a product than to
form the gradients says so in a subclass; every method has a general form here, which takes some samples at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, reduce

import torch
from torch import Tensor

from persample.dtypes import at_least_float32

#: As many numbers of sums over groups as are held at once where the samples are in no order.
AT_ONCE = 2**25


@dataclass(frozen=True)
class Block(ABC):
    """The gradients g_i of the samples `start` to `start + size`, by one parameter.

    Attributes:
        name: of the parameter.
        start: the number of the first sample in the batch.
        size: how many samples there are.
    """

    name: str
    start: int
    size: int

    @property
    def samples(self) -> slice:
        """Where the samples stand in the batch."""
        return slice(self.start, self.start + self.size)

    @abstractmethod
    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield g_i, `(b, *parameter.shape)`, of b samples after the other, and where these stand in the block.

        The tensors are the reader's own only to read. They have at least float32.
        """

    def formed(self) -> Tensor:
        """Return all g_i, shape `(size, *parameter.shape)`."""
        return torch.cat([g for _, g in self.pieces()])

    def sums(self) -> tuple[Tensor, Tensor]:
        """Return Σ_i g_i and Σ_i g_i²."""
        return self._sums

    @cached_property
    def _sums(self) -> tuple[Tensor, Tensor]:
        return self.compute_sums()

    def compute_sums(self) -> tuple[Tensor, Tensor]:
        """Return what `sums` keeps for whoever asks next."""
        total, squares = _added(torch.stack([g.sum(0), g.square().sum(0)]) for _, g in self.pieces())
        return total, squares

    def squared_norms(self) -> Tensor:
        """Return ‖g_i‖², shape `(size,)`."""
        return self._squared_norms

    @cached_property
    def _squared_norms(self) -> Tensor:
        return self.compute_squared_norms()

    def compute_squared_norms(self) -> Tensor:
        """Return what `squared_norms` keeps for whoever asks next."""
        return torch.cat([as_matrix(g).square().sum(1) for _, g in self.pieces()])

    def prepare_moments_and_norms(self) -> None:
        """Compute what `sums` and `squared_norms` will be asked for, both from the same gradients."""
        total, squares, norms = self.compute_moments_and_norms()
        vars(self).update(_sums=(total, squares), _squared_norms=norms)

    def compute_moments_and_norms(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return Σ_i g_i, Σ_i g_i² and ‖g_i‖²."""
        return *self.compute_sums(), self.compute_squared_norms()

    def to_keep(self) -> Block:
        """Return this block, or another one of the same gradients, for somebody who reads it more than once."""
        return self

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Return Σ_i w_i g_i, with a weight for each sample of the block, shape `(size,)`."""
        return _added(torch.tensordot(weights[where].to(g.dtype), g, 1) for where, g in self.pieces())

    def gram(self) -> Tensor:
        """Return the products g_i·g_j, shape `(size, size)`."""
        rows = []
        for where, g in self.pieces():  # never more than two pieces at once
            row = [_product(g, g if other == where else h) for other, h in self.pieces()]
            rows.append(torch.cat(row, 1))
        return torch.cat(rows)

    def products(self, others: Tensor) -> Tensor:
        """Return g_i·h_j for other gradients h_j, `(n, *parameter.shape)`, as `(size, n)`."""
        return torch.cat([_product(g, others.to(g.dtype)) for _, g in self.pieces()])


@dataclass(frozen=True)
class Formed(Block):
    """Gradients that have been formed.

    Attributes:
        rows: g_i, shape `(size, *parameter.shape)`, in at least float32.
    """

    rows: Tensor

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        yield slice(0, self.size), self.rows


@dataclass(frozen=True)
class Unknown(Block):
    """Gradients that are not a number.

    Attributes:
        parameter: the parameter.
    """

    parameter: Tensor

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        nothing = at_least_float32(torch.full_like(self.parameter, torch.nan)).unsqueeze(0)
        for sample in range(self.size):
            yield slice(sample, sample + 1), nothing


@dataclass(frozen=True)
class Scaled(Block):
    """Gradients multiplied by a number.

    Attributes:
        inner: the gradients.
        factor: the number.
    """

    inner: Block
    factor: float

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        for where, g in self.inner.pieces():
            yield where, g * self.factor

    def compute_sums(self) -> tuple[Tensor, Tensor]:
        total, squares = self.inner.sums()
        return total * self.factor, squares * self.factor**2

    def compute_squared_norms(self) -> Tensor:
        return self.inner.squared_norms() * self.factor**2

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return self.inner.weighted_sum(weights) * self.factor

    def gram(self) -> Tensor:
        return self.inner.gram() * self.factor**2

    def products(self, others: Tensor) -> Tensor:
        return self.inner.products(others) * self.factor


@dataclass(frozen=True)
class Grouped(Block):
    """The sums of gradients over groups of samples.

    Attributes:
        inner: the gradients of the samples.
        groups: for each sample of `inner` the number of its group, counted from the first of this block.
    """

    inner: Block
    groups: Tensor

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        return self._in_order() if bool((self.groups.diff() >= 0).all()) else self._in_rounds()

    def _in_rounds(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the sums of some groups after the other, of samples in any order: each time of all that are in one."""
        first = 0
        while first < self.size:
            total = None
            for where, g in self.inner.pieces():
                if total is None:
                    rows = max(1, AT_ONCE // max(1, g[0].numel()))
                    total = g.new_zeros(min(rows, self.size - first), *g.shape[1:])
                place = self.groups[where] - first
                here = (place >= 0) & (place < len(total))
                total.index_add_(0, place[here], g[here])
            assert total is not None  # a block has samples
            yield slice(first, first + len(total)), total
            first += len(total)

    def _in_order(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the sums of samples whose groups are ascending."""
        first, total = 0, None  # the groups from `first` on have no more than a part of their samples in `total`
        for where, g in self.inner.pieces():
            groups = self.groups[where]
            last = int(groups[-1])
            fresh = g.new_zeros(last + 1 - first, *g.shape[1:]).index_add_(0, groups - first, g)
            if total is not None:
                fresh[: len(total)] += total
            if last > first:
                yield slice(first, last), fresh[:-1]
            first, total = last, fresh[-1:]
        if total is not None:
            yield slice(first, first + 1), total

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return self.inner.weighted_sum(weights[self.groups])

    def gram(self) -> Tensor:
        products = self.inner.gram()
        rows = products.new_zeros(self.size, self.inner.size).index_add_(0, self.groups, products)
        return rows.new_zeros(self.size, self.size).index_add_(1, self.groups, rows)

    def products(self, others: Tensor) -> Tensor:
        products = self.inner.products(others)
        return products.new_zeros(self.size, len(others)).index_add_(0, self.groups, products)


def as_matrix(gradients: Tensor) -> Tensor:
    """Return gradients `(b, *parameter.shape)` as rows, `(b, P)`; a parameter may be a single number."""
    return gradients.flatten(1) if gradients.dim() > 1 else gradients.unsqueeze(1)


def _product(g: Tensor, h: Tensor) -> Tensor:
    return as_matrix(g) @ as_matrix(h).mT


def _added(parts: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, parts)
