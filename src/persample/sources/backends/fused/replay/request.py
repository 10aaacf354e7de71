"""What a step is asked for, so that one that was recorded for the same can serve it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from persample.quantities.protocol import Quantity
from persample.sources.batch import Batch
from persample.sources.contract import Read


class ChangingError(Exception):
    """Something is asked for that may be another thing in the next call, and nothing shows it."""


@dataclass(frozen=True)
class Request:
    """What a step is asked for.

    Attributes:
        key: what must be the same for a recorded step to serve.
        tensors: what it needs besides the batch.
        compute: computes it, from a source, a batch, and tensors like those; a tree of tensors.
    """

    key: Hashable
    tensors: Sequence[Tensor]
    compute: Callable[[Any, Batch, Sequence[Tensor]], Any]


def moments(compute: Callable[[Any, Batch], Any]) -> Request:
    """Return what asks for moments."""
    return Request("moments", (), lambda source, batch, tensors: compute(source, batch))


def quantities(asked: Sequence[Quantity[Any]], read: Read) -> Request:
    """Return what asks for quantities.

    Raises:
        ChangingError: one of them is not told by its values alone, as a function of the user's is not.
    """
    tensors: list[Tensor] = []
    key = tuple([_key_of(quantity, tensors) for quantity in asked])

    def compute(source: Any, batch: Batch, given: Sequence[Tensor]) -> Any:
        fresh = iter(given)
        return read(source, batch, mapped(Tensor, lambda tensor: next(fresh), list(asked)))

    return Request(key, tensors, compute)


def _key_of(value: Any, tensors: list[Tensor]) -> Hashable:
    """Return what `value` is made of, and put its tensors into `tensors`."""
    if value is None or type(value) in (bool, int, float, str):
        return type(value), value
    if type(value) is Tensor and value.layout is torch.strided and not value.requires_grad:
        tensors.append(value)
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, Mapping):
        return "mapping", *[(key, _key_of(entry, tensors)) for key, entry in value.items()]
    if type(value) in (list, tuple):
        return type(value), *[_key_of(entry, tensors) for entry in value]
    if dataclasses.is_dataclass(value) and type(value).__module__.startswith("persample.quantities."):
        return type(value), *[_key_of(getattr(value, f.name), tensors) for f in dataclasses.fields(value)]
    raise ChangingError(f"what is asked for depends on an object of type {type(value).__name__}, which may change")


def mapped(kind: type, function: Callable[[Any], Any], tree: Any) -> Any:
    """Return a tree of dicts, lists, tuples and dataclasses with `function` of each leaf of that kind in its place."""
    if isinstance(tree, kind):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: mapped(kind, function, entry) for key, entry in tree.items()}
    if isinstance(tree, list | tuple):
        entries = [mapped(kind, function, entry) for entry in tree]
        return type(tree)(*entries) if hasattr(tree, "_fields") else type(tree)(entries)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        each = [f.name for f in dataclasses.fields(tree) if f.init]
        return dataclasses.replace(tree, **{name: mapped(kind, function, getattr(tree, name)) for name in each})
    return tree


class Place:
    """Where a tensor is to stand in a result."""


def taken_apart(tree: Any) -> tuple[list[Tensor], Any]:
    """Return the tensors of a result, and the result with places in their place."""
    tensors: list[Tensor] = []

    def take(tensor: Tensor) -> Place:
        tensors.append(tensor)
        return Place()

    return tensors, mapped(Tensor, take, tree)


def put_together(form: Any, tensors: Sequence[Tensor]) -> Any:
    """Return a result with `tensors` in its places."""
    fresh: Iterator[Tensor] = iter(tensors)
    return mapped(Place, lambda place: next(fresh), form)
