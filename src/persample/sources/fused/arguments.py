"""The tensors in the nested arguments of an operation: which they are, and the same arguments with others in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Yield all tensors in nested tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, dict):
        yield from tensors_in(tuple(tree.values()))


def substitute(tree: Any, replacements: Mapping[int, Tensor]) -> Any:
    """Return `tree` with the tensors whose id is in `replacements` replaced."""
    if isinstance(tree, Tensor):
        return replacements.get(id(tree), tree)
    if isinstance(tree, dict):
        return {key: substitute(value, replacements) for key, value in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(substitute(item, replacements) for item in tree)
    return tree
