"""The tensors in the nested arguments of an operation: which they are, and the same arguments with others in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def tensors_in(tree: Any) -> list[Tensor]:
    """Return all tensors in nested tuples, lists and dicts."""
    found: list[Tensor] = []
    _collect(tree, found)
    return found


def _collect(tree: Any, found: list[Tensor]) -> None:
    # On the way of every operation of a forward pass: no generator, and no look at what is most often there.
    for item in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, tuple | list) else (tree,):
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, tuple | list | dict) and item:
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
