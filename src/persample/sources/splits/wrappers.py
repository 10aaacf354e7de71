"""`shared`, `batched`, `one_per_sample`: declaring how an argument or a target is split into samples."""

from __future__ import annotations

from typing import Any

from torch.utils import _pytree as pytree

from persample.errors import BatchError
from persample.sources.splits.parts import Batched, Entries, Shared
from persample.sources.splits.tree import Split, tensors_in


def shared(value: Any) -> Shared:
    """Declare that all samples share an argument of the model, or a target: a mask `(T, T)`, an adjacency, positions.

    Args:
        value: a tensor, or anything else, which the model gets as it is, for one sample as for all.

    Example:
        >>> import torch, persample
        >>> inputs = (torch.randn(8, 5, 4), persample.shared(torch.ones(5, 5).tril()))
    """
    _refuse_splits("shared", value)
    return Shared(value)


def batched(value: Any, dim: int) -> Batched:
    """Declare which dimension of an argument of the model, or of a target, holds the samples.

    Args:
        value: a tensor, or tensors in tuples, lists and dicts, all with their samples in the same dimension.
        dim: that dimension; negative numbers count from the last one.

    Raises:
        BatchError: there is no tensor, or one of them has no such dimension.

    Example:
        >>> import torch, persample
        >>> states = torch.zeros(2, 8, 16), torch.zeros(2, 8, 16)  # (layers, B, H)
        >>> inputs = (torch.randn(8, 5, 4), persample.batched(states, dim=1))
    """
    _refuse_splits("batched", value)
    if type(dim) is not int:
        raise BatchError(f"batched() got dim={dim!r}: it must be an integer, the dimension that holds the samples.")
    tensors = tensors_in(value)
    if not tensors:
        raise BatchError(f"batched() got {type(value).__name__}, which holds no tensor: pass a tensor.")
    for tensor in tensors:
        if not -tensor.dim() <= dim < tensor.dim():
            raise BatchError(f"batched() got dim={dim}, but a tensor of shape {tuple(tensor.shape)} has no such one.")
    return Batched(value, dim)


def one_per_sample(entries: list[Any]) -> Entries:
    """Declare that a list has one entry for each sample: sets, sequences of different lengths, targets of a detector.

    A list of B entries is taken for that anyway, unless all tensors in it have B entries in dim 0.

    Args:
        entries: one for each sample; tensors, dicts of tensors, or anything else. The model gets a list.

    Raises:
        BatchError: it is no list.

    Example:
        >>> import torch, persample
        >>> inputs = (persample.one_per_sample([torch.randn(n, 3) for n in (2, 2)]),)
    """
    _refuse_splits("one_per_sample", entries)
    if not isinstance(entries, list):
        raise BatchError(f"one_per_sample() got {type(entries).__name__}: pass a list with an entry for each sample.")
    return Entries(entries)


def _refuse_splits(name: str, value: Any) -> None:
    if any(isinstance(leaf, Split) for leaf in pytree.tree_leaves(value)):
        raise BatchError(f"{name}() got what shared(), batched() or one_per_sample() returned: use one of them.")
