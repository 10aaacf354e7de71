"""Parts of sample tensors that come from parameters alone, such as a class token beside patches.

Rows that are read from such a part are made of parameters again, whose samples' rows they may be: a model of frames
takes the class token of all videos from the first B of its B·T frames. So what was put beside samples is remembered,
through operations that move entries or act on each of them, until rows are picked.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from persample.errors import UnsupportedModelError
from persample.sources.backends.fused.expressions import version_of

Whole = Callable[..., Tensor]
"""Makes an expression of the shape of a tensor, which has a part's entries where the part is."""


class Parts(NamedTuple):
    """The parts of a tensor.

    Attributes:
        numbers: which part each of its entries is of; -1 for samples. An expanded tensor, which takes no memory.
        wholes: what makes each part. It is given the trace, to which nothing refers back.
    """

    numbers: Tensor
    wholes: Sequence[Whole]


class PartTable:
    """The parts of tensors, found by the tensor's identity; no tensor is kept alive by it."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], int, Parts]] = {}
        self._read: list[tuple[Tensor, int]] = []

    def __bool__(self) -> bool:
        return bool(self._entries)

    def __setitem__(self, tensor: Tensor, parts: Parts) -> None:
        self._entries[id(tensor)] = weakref.ref(tensor), version_of(tensor), parts

    def get(self, tensor: Tensor) -> Parts | None:
        """Return the parts of `tensor`; None if it has none, or was written to."""
        entry = self._entries.get(id(tensor))
        if entry is None or entry[0]() is not tensor or version_of(tensor) != entry[1]:
            return None
        return entry[2]

    def instead_of(self, view: Tensor, part: Tensor) -> None:
        """Remember that a view is `part`; neither may be written to later."""
        self._read += [(t, version_of(t)) for t in (view, part)]

    def refuse_written(self) -> None:
        """Raise if a tensor was written to after expressions were read from it."""
        if any(version_of(view) != version for view, version in self._read):
            raise UnsupportedModelError(
                "A tensor that holds parameters beside samples (a class token), or a part of it, was changed in place "
                "after rows had been read from it, which backend 'fused' cannot follow: read them later, or use an "
                "out-of-place operation."
            )
