"""Finding the parts of a batch that are not split along dim 0: lists of samples, packed sequences, objects."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from persample.sources.splits.objects import fields_of, holds_tensors, is_array, with_fields
from persample.sources.splits.parts import Batched, Entries, Fields, Packed, Shared
from persample.sources.splits.tree import Split, sizes_of, tensors_in


def with_splits(inputs: Any, targets: Any) -> tuple[Any, Any]:
    """Return both, with a `Split` each, for lists of samples, for packed sequences, and for objects that hold tensors.

    A list of B entries has one for each sample, unless dim 0 of all tensors in it is the sample; but if it is one of
    dicts, it has so in any case. In `targets` a list of B numbers becomes a tensor. Arrays become tensors.
    """
    inputs, targets = _opened((inputs, targets))
    size = _likely_size((inputs, targets))
    if size is None:
        return inputs, targets
    packed = next((leaf.packed for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Packed)), None)
    device = next((tensor.device for tensor in tensors_in(inputs)), None)

    def resolved(tree: Any, numbers: bool) -> Any:
        def of_leaf(leaf: Any) -> Any:
            if isinstance(leaf, Fields):
                return Fields(leaf.original, resolved(leaf.fields, numbers))
            if isinstance(leaf, list) and numbers and leaf and all(map(_is_number, leaf)):
                # As a whole they must be the samples'; elsewhere they may be settings.
                return torch.tensor(leaf, device=device) if len(leaf) == size or leaf is targets else leaf
            if isinstance(leaf, list) and is_of_samples(leaf, size):
                return Entries(leaf, guessed=True)
            if packed is not None and isinstance(leaf, Tensor) and leaf.shape[:1] == packed.data.shape[:1] != (size,):
                return Packed(packed._replace(data=leaf), whole=False)
            return leaf

        return pytree.tree_map(of_leaf, tree, is_leaf=is_list)

    return resolved(inputs, numbers=False), resolved(targets, numbers=True)


def is_of_samples(entries: list[Any], size: int) -> bool:
    """Whether a list in a batch of `size` samples has an entry for each of them, or cannot be anything else."""
    if size == len(entries) and all(isinstance(entry, dict) for entry in entries):
        return True
    lengths = [tensor.shape[:1] for tensor in tensors_in(entries)]
    if lengths and all(length == (size,) for length in lengths):
        return False
    return len(entries) == size or bool(lengths and all(length != (size,) for length in lengths))


def _opened(tree: Any) -> Any:
    """Return `tree` with arrays as tensors, and a `Split` for each packed sequence or object that holds tensors."""

    def opened(leaf: Any) -> Any:
        if is_array(leaf) and leaf.dtype.kind in "biuf":
            return torch.as_tensor(leaf)
        if isinstance(leaf, PackedSequence):
            return Packed(leaf)
        if isinstance(leaf, Shared):
            return Shared(_opened(leaf.tree))
        if isinstance(leaf, Batched):
            return Batched(_opened(leaf.tree), leaf.dim)
        if isinstance(leaf, Entries):
            return Entries([_opened(entry) for entry in leaf.entries], leaf.guessed)
        fields = None if isinstance(leaf, Tensor | Split) else fields_of(leaf)
        return Fields(leaf, _opened(fields)) if fields and holds_tensors(fields) else leaf

    return pytree.tree_map(opened, tree, is_leaf=_is_packed)


def unwrapped(tree: Any) -> Any:
    """Return `tree` without `persample.shared` and the like; None if it has none."""
    found = False

    def of_leaf(leaf: Any) -> Any:
        nonlocal found
        if isinstance(leaf, Split):
            found = True
            return leaf.value
        fields = None if isinstance(leaf, Tensor) else fields_of(leaf)
        inside = unwrapped(fields) if fields else None
        if inside is None:
            return leaf
        found = True
        return with_fields(leaf, inside)

    result = pytree.tree_map(of_leaf, tree, is_leaf=_is_packed)
    return result if found else None


def _likely_size(tree: Any) -> int | None:
    """Return B, from parts that declare their split, else the first tensor, else the first list."""
    leaves = list(_without_lists(tree))
    splits = [leaf for leaf in leaves if isinstance(leaf, Split)]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0]
    for leaf in (*splits, *tensors):
        for _, size in sizes_of("", leaf):
            return size
    for entries in (leaf for leaf in leaves if isinstance(leaf, list)):
        lengths = {tensor.shape[:1] for tensor in tensors_in(entries)}
        if lengths:
            return lengths.pop()[0] if len(lengths) == 1 and () not in lengths else len(entries)
    return None


def _without_lists(tree: Any) -> Iterator[Any]:
    """Yield the leaves of `tree`, lists as a whole, and the contents of objects."""
    for leaf in pytree.tree_leaves(tree, is_leaf=is_list):
        if isinstance(leaf, Fields):
            yield from _without_lists(leaf.fields)
        else:
            yield leaf


def _is_packed(node: Any) -> bool:
    return isinstance(node, PackedSequence)


def is_list(node: Any) -> bool:
    """Whether a node of a tree is a list."""
    return isinstance(node, list)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.dim() == 0)
