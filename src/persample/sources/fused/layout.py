"""Where the sample is in a tensor: followed from the batch through every operation of the forward pass.

A tensor that depends on the batch holds the samples along some dimension, perhaps folded together with others. In
row-major order the entry with linear index n belongs to sample (n // inner) mod B, so two numbers say it all:

    numel = outer · B · inner

A batch-first tensor has outer = 1; a time-first one, (T, B, D), has outer = T and inner = D; one of folded heads,
(B·H, T, D), has outer = 1 and inner = H·T·D. A reshape changes neither number.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The samples' place in a tensor of `outer · batch · inner` entries in row-major order."""

    outer: int
    batch: int
    inner: int

    def sample_first(self, x: Tensor, features: int) -> Tensor:
        """Return `x` as `(B, L, F)`, with F = `features` trailing entries and all else of a sample as positions.

        Raises:
            ValueError: the samples are folded into the features.
        """
        self.require_features(features)
        parts = x.reshape(self.outer, self.batch, self.inner // features, features)
        if self.outer == 1:
            return parts.squeeze(0)
        return parts.transpose(0, 1).flatten(1, 2)

    def require_features(self, *features: int) -> None:
        """Raise `ValueError` unless the trailing entries can be taken together, so many at a time."""
        if 0 in features:
            raise ValueError("it has no features")
        if self.inner % features[0]:
            raise ValueError("the samples are not in the leading dimensions")

    def dim(self, shape: Sequence[int]) -> tuple[int, int, int] | None:
        """Return the dimension of `shape` that holds the samples, and what is folded before and after them in it."""
        before = 1
        for index, size in enumerate(shape):
            after = math.prod(shape[index + 1 :])
            if after and self.outer % before == 0 and self.inner % after == 0:
                folded_before, folded_after = self.outer // before, self.inner // after
                if size == folded_before * self.batch * folded_after:
                    return index, folded_before, folded_after
            before *= size
        return None


class Layouts:
    """The layouts of tensors, found by the tensor's identity; no tensor is kept alive by it.

    A tensor can be known to depend on the batch without anybody knowing where the samples are in it: then its layout
    is None.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], Layout | None]] = {}

    def __setitem__(self, tensor: Tensor, layout: Layout | None) -> None:
        self._entries[id(tensor)] = (weakref.ref(tensor), layout)

    def __contains__(self, tensor: Tensor) -> bool:
        entry = self._entries.get(id(tensor))
        return entry is not None and entry[0]() is tensor  # another tensor may have its address by now

    def get(self, tensor: Tensor) -> Layout | None:
        """Return the layout of `tensor`, or None if it is not known."""
        entry = self._entries.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None


def batch_first(x: Tensor, batch: int) -> Layout:
    """The layout of a tensor whose dim 0 is the sample."""
    return Layout(1, batch, x.numel() // batch)


def permuted(layout: Layout, shape: Sequence[int], order: Sequence[int]) -> Layout | None:
    """The layout after the dimensions of `shape` were put in `order`."""
    found = layout.dim(shape)
    if found is None:
        return None
    index, folded_before, folded_after = found
    place = list(order).index(index)
    before = math.prod(shape[d] for d in order[:place])
    after = math.prod(shape[d] for d in order[place + 1 :])
    return Layout(before * folded_before, layout.batch, folded_after * after)


def carried(
    layout: Layout, shape: Sequence[int], result: Sequence[int], *, behind_first: bool = False
) -> Layout | None:
    """The layout after an operation that left either what stands before the sample, or what stands behind, alone.

    Args:
        layout: the layout before.
        shape: the shape before.
        result: the shape afterwards.
        behind_first: whether the operation is one that adds dimensions in front (stacking, broadcasting).

    Returns:
        None where neither is the case, or where sizes agree by chance so that nobody can tell.
    """
    found = layout.dim(shape)
    if found is None or layout.inner == 0 or layout.outer == 0:
        return None
    index, size = found[0], math.prod(result)
    candidates = []
    if tuple(result[: index + 1]) == tuple(shape[: index + 1]):
        candidates.append(Layout(layout.outer, layout.batch, size // (layout.outer * layout.batch)))
    behind = len(shape) - index
    if len(result) >= behind and tuple(result[len(result) - behind :]) == tuple(shape[index:]):
        candidates.append(Layout(size // (layout.batch * layout.inner), layout.batch, layout.inner))
    if behind_first:
        candidates = candidates[-1:]
    return candidates[0] if len(set(candidates)) == 1 else None
