"""The followed tensors, each with the layout of its samples."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from persample.sources.backends.fused.propagation.lost import Lost, Where


class Layouts:
    """Where the samples are in tensors, found by the tensor's identity; no tensor is kept alive by it.

    Activation checkpointing repeats parts of the forward pass. What goes in is the same object as before; or, where
    another checkpoint intercepts autograd's saved tensors, one with the same memory and with a history.
    """

    def __init__(self) -> None:
        self.forward_pass = True
        self._entries: dict[int, tuple[weakref.ref[Tensor], Where]] = {}
        self._by_memory: dict[tuple[object, ...], Where] = {}

    def __setitem__(self, tensor: Tensor, where: Where) -> None:
        self._entries[id(tensor)] = (weakref.ref(tensor), where)
        if saved_tensors_are_intercepted():
            self._by_memory[_memory(tensor)] = where

    def __contains__(self, tensor: Tensor) -> bool:
        entry = self._entries.get(id(tensor))
        if entry is not None and entry[0]() is tensor:  # another tensor may have its address by now
            return True
        return not self.forward_pass and tensor.grad_fn is not None and _memory(tensor) in self._by_memory

    def get(self, tensor: Tensor) -> Where:
        """Return where the samples are in `tensor`; None if it is not followed."""
        where = self._noted(tensor)
        if isinstance(where, Lost) and where.pending is not None and where.pending.complete:
            return where.pending
        return where

    def _noted(self, tensor: Tensor) -> Where:
        entry = self._entries.get(id(tensor))
        if entry is not None and entry[0]() is tensor:
            return entry[1]
        return self._by_memory.get(_memory(tensor)) if tensor in self else None


class Seen:
    """A set of tensors, by identity."""

    def __init__(self) -> None:
        self._entries: dict[int, weakref.ref[Tensor]] = {}

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Remember `tensors`."""
        self._entries.update((id(tensor), weakref.ref(tensor)) for tensor in tensors)

    def __contains__(self, tensor: Tensor) -> bool:
        entry = self._entries.get(id(tensor))
        return entry is not None and entry() is tensor


def saved_tensors_are_intercepted() -> bool:
    """Whether something intercepts what autograd saves, as activation checkpointing does."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _memory(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
