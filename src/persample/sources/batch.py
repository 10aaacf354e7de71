"""A mini-batch as every source sees it: positional and keyword arguments of the model, targets, and the size B."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from persample.errors import BatchError
from persample.sources.entering import changeable, entering


@dataclass(frozen=True)
class Batch:
    """B samples. Dim 0 of every tensor in `args`, `kwargs` and `targets` is the sample."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    targets: Any
    size: int

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the batch."""
        leaves: Iterable[Any] = (*self.args, *self.kwargs.values(), self.targets)
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            leaves = pytree.tree_leaves((self.args, dict(self.kwargs), self.targets))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def for_a_call(self) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """Return arguments and targets as one call of model and loss may have them, and change them in place."""
        args, kwargs, targets = map_tensors(changeable(), (self.args, dict(self.kwargs), self.targets))
        return args, kwargs, targets

    def kind(self) -> tuple[Any, ...]:
        """Return what batches of the same kind have in common: structure, dtypes and numbers of dimensions."""
        leaves: Sequence[Any] = (*self.args, *self.kwargs.values(), self.targets)
        structure = ""
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            leaves, spec = pytree.tree_flatten((self.args, dict(self.kwargs), self.targets))
            structure = str(spec)
        described = [
            (leaf.dtype, leaf.dim(), leaf.requires_grad) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves
        ]
        return structure, len(self.args), *self.kwargs, *described

    def with_targets(self, targets: Any) -> Batch:
        """Return the batch with the same inputs, detached from whatever they were computed from, and other targets."""
        args, kwargs = map_tensors(entering(), (self.args, dict(self.kwargs)))
        return Batch(args, kwargs, targets, self.size)

    def double(self) -> Batch:
        """Return the batch in float64; whole numbers stay as they are."""
        args, kwargs, targets = in_float64((self.args, dict(self.kwargs), self.targets))
        return Batch(args, kwargs, targets, self.size)

    def rows(self, index: slice | list[int]) -> Batch:
        """Return the batch of the samples at `index`, in that order."""
        args, kwargs, targets = take_rows((self.args, dict(self.kwargs), self.targets), index)
        size = len(range(self.size)[index]) if isinstance(index, slice) else len(index)
        return Batch(args, kwargs, targets, size)


def in_float64(tree: Any) -> Any:
    """Return `tree` with every floating-point tensor in float64; whole numbers stay as they are."""
    return map_tensors(entering(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor), tree)


def take_rows(tree: Any, index: slice | list[int]) -> Any:
    """Return `tree` with every tensor replaced by its rows at `index`; what is not a tensor stays as it is."""
    return map_tensors(entering(lambda tensor: tensor[index]), tree)


def as_batch(inputs: Any, targets: Any) -> Batch:
    """Return `inputs` and `targets` as a `Batch`.

    Args:
        inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments of the model. Dim 0 of every
            tensor is the sample; what is not a tensor (None, flags, numbers) is passed to the model as it is.
        targets: a tensor, or tensors in tuples, lists and dicts, whose dim 0 is the sample; or None.

    Raises:
        BatchError: there is no tensor, no sample, or the lengths differ.
    """
    if torch.is_inference_mode_enabled():
        raise BatchError(
            "torch.inference_mode() is active, in which no gradient exists: leave it, or use torch.no_grad() instead."
        )
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, Tensor):
        args = (inputs,)
    elif isinstance(inputs, tuple):
        args = inputs
    elif isinstance(inputs, Mapping):
        kwargs = dict(inputs)
    else:
        raise BatchError(
            f"inputs is of type {type(inputs).__name__}: pass a tensor, a tuple of positional arguments or a dict "
            "of keyword arguments of the model."
        )
    lengths = _lengths("inputs", inputs if isinstance(inputs, Tensor) else kwargs or args)
    if not lengths:
        raise BatchError("inputs holds no tensor: pass at least one tensor whose dim 0 is the sample.")
    lengths |= _lengths("targets", targets)
    (first, size), *others = lengths.items()
    for name, length in others:
        if length != size:
            raise BatchError(
                f"{first} has {size} samples, but {name} has {length}: dim 0 of every tensor is the sample, so all "
                "must have the same length there."
            )
    if size == 0:
        raise BatchError("The batch has no samples: skip empty batches, no gradient can be averaged over them.")
    # Whatever the batch was computed from is no part of the model.
    args, kwargs, targets = map_tensors(entering(), (args, kwargs, targets))
    return Batch(args, kwargs, targets, size)


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Return `tree` with every tensor replaced by the function of it; what is not a tensor stays as it is."""
    if isinstance(tree, Tensor):
        return function(tree)
    if type(tree) is tuple:
        return tuple([map_tensors(function, value) for value in tree])
    if type(tree) is dict:
        return {key: map_tensors(function, value) for key, value in tree.items()}
    return pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def _lengths(name: str, tree: Any) -> dict[str, int]:
    """Length of dim 0 of each tensor in `tree`, keyed by where it is."""
    lengths = {}
    leaves = [((), tree)] if isinstance(tree, Tensor) else pytree.tree_flatten_with_path(tree)[0]
    for path, leaf in leaves:
        if not isinstance(leaf, Tensor):
            continue
        where = name + pytree.keystr(path) if len(leaves) > 1 else name
        if leaf.dim() == 0:
            raise BatchError(
                f"{where} is a tensor without dimensions: dim 0 must be the sample. Pass plain numbers as Python "
                "numbers, or expand the tensor to one entry per sample."
            )
        if leaf.is_inference():
            raise BatchError(
                f"{where} was made under torch.inference_mode(), so autograd cannot save it: pass {where}.clone()."
            )
        if leaf.layout != torch.strided or leaf.is_nested:
            raise BatchError(
                f"{where} is a sparse or nested tensor ({leaf.layout}), of which single samples cannot be taken: pass "
                "an ordinary one (.to_dense(), .to_padded_tensor(0.0)) and make it sparse in the model."
            )
        lengths[where] = len(leaf)
    return lengths
