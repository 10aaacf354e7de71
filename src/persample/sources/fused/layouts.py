"""The tensors that are followed, and where the samples are in each."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from persample.sources.fused.following import Where


class Layouts:
    """Where the samples are in tensors, found by the tensor's identity; no tensor is kept alive by it.

    Activation checkpointing may repeat a part of the forward pass on other tensors with the same memory as before. So
    in the backward pass, tensors that were seen where something intercepts autograd's saved tensors, as it does, are
    found by their memory, too. That serves to repeat the same operations; what has been tapped stays as it was.
    """

    def __init__(self) -> None:
        self.forward_pass = True
        self._entries: dict[int, tuple[weakref.ref[Tensor], Where]] = {}
        self._by_memory: dict[tuple[object, ...], Where] = {}

    def __setitem__(self, tensor: Tensor, where: Where) -> None:
        self._entries[id(tensor)] = (weakref.ref(tensor), where)

    def __contains__(self, tensor: Tensor) -> bool:
        entry = self._entries.get(id(tensor))
        if entry is not None and entry[0]() is tensor:  # another tensor may have its address by now
            return True
        return not self.forward_pass and _memory(tensor) in self._by_memory

    def get(self, tensor: Tensor) -> Where:
        """Return where the samples are in `tensor`; None if it is not followed."""
        entry = self._entries.get(id(tensor))
        if entry is not None and entry[0]() is tensor:
            return entry[1]
        return None if self.forward_pass else self._by_memory.get(_memory(tensor))

    def remember(self, tensors: Iterable[Tensor]) -> None:
        """Make followed tensors findable by their memory, where checkpointing may need that."""
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            for tensor in tensors:
                self._by_memory[_memory(tensor)] = self.get(tensor)


def _memory(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
