"""Parsing the index of `x[index]`, for rules and for following the samples.

PyTorch reads them in two steps. Integers, slices, None and an Ellipsis give a view, `x[basic]`. Tensors of numbers then
look up in one dimension of it each, masks in as many as they have. Tensors of numbers without dimensions are integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from persample.sources.backends.fused.op_table import functions

_MASKS = (torch.bool, torch.uint8)


class Lookup(NamedTuple):
    """`x[index]`, read.

    Attributes:
        basic: integers, slices and None, which together speak of all dimensions of x.
        tensors: the tensors of numbers and the masks, each by the first dimension of `x[basic]` that it looks up in.
        before: how many dimensions of the result stand before those of the numbers.
    """

    basic: tuple[Any, ...]
    tensors: Mapping[int, Tensor]
    before: int


def read(index: Any, table: Tensor) -> Lookup:
    """Parse `index` for a tensor."""
    parts = [_part(part, table.device) for part in _as_tuple(index)]
    missing = [slice(None)] * (table.dim() - sum(map(_covered, parts)))
    dots = next((number for number, part in enumerate(parts) if part is Ellipsis), len(parts))
    parts[dots : dots + 1] = missing
    basic: list[Any] = []
    tensors: dict[int, Tensor] = {}
    spans: list[range] = []  # of the tensors, among the dimensions that integers leave
    dim = position = 0
    for part in parts:
        if isinstance(part, Tensor):
            width = part.dim() if is_mask(part) else 1
            tensors[dim] = part
            basic += [slice(None)] * width or [None]
            dim += width or 1
            if is_mask(part) or part.dim() > 0:
                spans.append(range(position, position + (width or 1)))
                position += width or 1
        else:
            basic.append(part)
            kept = part is None or isinstance(part, slice)
            dim, position = dim + kept, position + kept
    beside = all(first.stop == second.start for first, second in pairwise(spans))
    return Lookup(tuple(basic), tensors, spans[0].start if spans and beside else 0)


def lookup_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Lookup | None:
    """Return the index of an operation that reads from its first operand; None for other operations."""
    if func is Tensor.__getitem__:
        return read(args[1], args[0])
    if func in _WHOLE:
        index = kwargs.get("index", kwargs.get("indices", args[_WHOLE[func]] if len(args) > _WHOLE[func] else None))
        return Lookup((), {0: index}, 0) if isinstance(index, Tensor) else None
    if func in _INDEX_SELECT:
        dim, index = (*args[1:], *(kwargs[name] for name in ("dim", "index") if name in kwargs))
        return read(selecting(dim, index, args[0].dim()), args[0])
    return None


def written_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Lookup | None:
    """Return the index of an operation that writes to its first operand; None for other operations."""
    if func is Tensor.__setitem__:
        return read(args[1], args[0])
    if func in _PUT:
        return read(tuple(kwargs["indices"] if "indices" in kwargs else args[1]), args[0])
    return None


def selecting(dim: int, index: Tensor, dimensions: int) -> tuple[Any, ...]:
    """Return `index_select`'s arguments as an index."""
    return (*[slice(None)] * (dim % max(dimensions, 1)), index.reshape(1) if index.dim() == 0 else index)


def is_mask(tensor: Tensor) -> bool:
    """Whether an index tensor is a mask, not numbers."""
    return tensor.dtype in _MASKS


#: Lookups with a result of the shape of the indices, and where these stand.
_WHOLE: Mapping[Any, int] = dict.fromkeys(functions("take take_along_dim"), 1) | dict.fromkeys(functions("gather"), 2)
_INDEX_SELECT = functions("index_select")
_PUT = functions("index_put")


def _as_tuple(index: Any) -> tuple[Any, ...]:
    """Return the parts of an index; a list of anything but numbers counts as a tuple."""
    if isinstance(index, tuple):
        return index
    if isinstance(index, Sequence) and len(index) < 32 and any(map(_is_no_number, index)):
        return tuple(index)
    return (index,)


def _is_no_number(item: Any) -> bool:
    return item is None or item is Ellipsis or isinstance(item, Tensor | Sequence | slice)


def _part(part: Any, device: torch.device) -> Any:
    """Return sequences and truth values as tensors on `device`."""
    if isinstance(part, Tensor | slice) or part is None or part is Ellipsis:
        return part
    if isinstance(part, bool):
        return torch.tensor(part, device=device)
    if isinstance(part, Integral):
        return int(part)
    if isinstance(part, list | tuple) and any(isinstance(item, Tensor) for item in part):
        return torch.stack([torch.as_tensor(item, device=device) for item in part])
    numbers = torch.as_tensor(part, device=device)
    return numbers if numbers.numel() or is_mask(numbers) else numbers.long()


def _covered(part: Any) -> int:
    """How many dimensions of x a part of the index consumes."""
    if part is None or part is Ellipsis:
        return 0
    return part.dim() if isinstance(part, Tensor) and is_mask(part) else 1
