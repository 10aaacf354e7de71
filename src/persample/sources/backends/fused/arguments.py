"""The tensors in the nested arguments of an operation: finding and replacing them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


def tensors_in(tree: Any) -> list[Tensor]:
    """Return all tensors in nested tuples, lists and dicts."""
    found: list[Tensor] = []
    _collect(tree, found)
    return found


# This is on the way of every operation of a forward pass: no generator, no union of types (it would be made anew at
# every look), and most arguments are known by their type.
_SEQUENCES = (tuple, list)
_NESTED = (tuple, list, dict)
_TENSORS = frozenset((Tensor, nn.Parameter))
_OTHERS = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size))


def _collect(tree: Any, found: list[Tensor]) -> None:
    for item in tree if isinstance(tree, _SEQUENCES) else tree.values() if isinstance(tree, dict) else (tree,):
        kind = type(item)
        if kind in _TENSORS:
            found.append(item)
        elif kind in _OTHERS:
            continue
        elif isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, _NESTED) and item:
            _collect(item, found)


def substitute(tree: Any, replacements: Mapping[int, Tensor]) -> Any:
    """Return `tree` with the tensors whose id is in `replacements` replaced."""
    if isinstance(tree, Tensor):
        return replacements.get(id(tree), tree)
    if isinstance(tree, dict):
        return {key: substitute(value, replacements) for key, value in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(substitute(item, replacements) for item in tree)
    return tree


def memory_of(tensor: Tensor) -> tuple[torch.device, int]:
    """Return the address of the storage that `tensor` shares with its views."""
    storage = tensor.untyped_storage()
    # A tensor without values, as the one that a step is recorded with, has a storage, but no memory.
    return tensor.device, storage._cdata if isinstance(tensor, FakeTensor) else storage.data_ptr()
