"""Which operation of PyTorch has which rule, and what is known of those that use no parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from persample.sources.fused.rules.attached import add, concatenate, multiply
from persample.sources.fused.rules.attention import attention
from persample.sources.fused.rules.convolution import convolutions, transposed_convolutions
from persample.sources.fused.rules.embedding import embedding
from persample.sources.fused.rules.fallback import fallback as fallback
from persample.sources.fused.rules.fallback import no_rule as no_rule
from persample.sources.fused.rules.linear import addmm, linear, matmul
from persample.sources.fused.rules.normalization import batch_norm, group_norm, instance_norm, layer_norm, rms_norm
from persample.sources.module_calls import is_range

#: `rule(capture, *args, **kwargs)` runs the operation and returns its result with a tap.
RULES: Mapping[Any, Callable[..., Any]] = {
    F.linear: linear,
    torch.matmul: matmul,
    Tensor.matmul: matmul,
    Tensor.__matmul__: matmul,
    torch.mm: matmul,
    Tensor.mm: matmul,
    torch.addmm: addmm,
    Tensor.addmm: addmm,
    **convolutions,
    **transposed_convolutions,
    F.embedding: embedding,
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.rms_norm: rms_norm,
    F.scaled_dot_product_attention: attention,
    torch.add: add,
    Tensor.add: add,
    Tensor.__add__: add,
    Tensor.__radd__: add,
    torch.mul: multiply,
    Tensor.mul: multiply,
    Tensor.__mul__: multiply,
    Tensor.__rmul__: multiply,
    torch.cat: concatenate,
    torch.concat: concatenate,
    torch.concatenate: concatenate,
}

#: Operations that keep the row-major order of the entries.
RESHAPES = {
    Tensor.view,
    Tensor.reshape,
    torch.reshape,
    Tensor.view_as,
    Tensor.reshape_as,
    Tensor.flatten,
    torch.flatten,
    Tensor.unflatten,
    torch.unflatten,
    Tensor.squeeze,
    torch.squeeze,
    Tensor.unsqueeze,
    torch.unsqueeze,
    Tensor.contiguous,
    Tensor.clone,
    torch.clone,
}


def _permute(x: Tensor, *dims: Any, **kwargs: Any) -> list[int]:
    order = kwargs.get("dims", dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims)
    return [d % x.dim() for d in order]


def _transpose(x: Tensor, *dims: int, **kwargs: int) -> list[int]:
    first, second, *_ = (*dims, *kwargs.values())
    order = list(range(x.dim()))
    order[first], order[second] = order[second], order[first]
    return order


def _movedim(x: Tensor, *args: Any, **kwargs: Any) -> list[int]:
    moved = torch.empty([1] * x.dim()).movedim(*args, **kwargs)  # raises what PyTorch raises
    del moved
    source, destination = (*args, *kwargs.values())
    sources = [d % x.dim() for d in (source if isinstance(source, tuple | list) else [source])]
    targets = [d % x.dim() for d in (destination if isinstance(destination, tuple | list) else [destination])]
    rest = [d for d in range(x.dim()) if d not in sources]
    order = [-1] * x.dim()
    for d, target in zip(sources, targets, strict=True):
        order[target] = d
    return [d if d >= 0 else rest.pop(0) for d in order]


def _last_two(x: Tensor, *_: Any) -> list[int]:
    return _transpose(x, -2, -1)


def _reversed(x: Tensor, *_: Any) -> list[int]:
    return list(reversed(range(x.dim())))


#: Operations that put the dimensions in another order: the order, given the operand and the other arguments.
PERMUTES: Mapping[Any, Callable[..., list[int]]] = {
    Tensor.permute: _permute,
    torch.permute: _permute,
    Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    Tensor.swapaxes: _transpose,
    torch.swapaxes: _transpose,
    Tensor.swapdims: _transpose,
    torch.swapdims: _transpose,
    Tensor.movedim: _movedim,
    torch.movedim: _movedim,
    Tensor.moveaxis: _movedim,
    torch.moveaxis: _movedim,
    Tensor.t: _reversed,
    torch.t: _reversed,
    Tensor.T.__get__: _reversed,  # type: ignore[attr-defined]
    Tensor.mT.__get__: _last_two,  # type: ignore[attr-defined]
}


def without_input(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments but the operand, which the functions of `torch` call `input`."""
    return {name: value for name, value in kwargs.items() if name != "input"}


_PICKING = {
    "index_select",
    "index_copy",
    "index_add",
    "index_fill",
    "index_put",
    "gather",
    "scatter",
    "scatter_add",
    "scatter_reduce",
    "masked_select",
    "masked_scatter",
    "take",
    "take_along_dim",
    "put",
    "sort",
    "argsort",
    "topk",
    "flip",
    "flipud",
    "roll",
    "rot90",
    "repeat_interleave",
    "unique",
    "nonzero",
    "as_strided",
    "__setitem__",
}


def moves_rows(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], source: Tensor) -> bool:
    """Whether an operation may pick or reorder samples, so that nobody can tell where they are afterwards."""
    if func is Tensor.__getitem__:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        picked = [i for i in index if isinstance(i, Tensor | list)]
        if not picked or index[0] is not picked[0]:
            return False  # dim 0 is not picked from
        return not (isinstance(picked[0], Tensor) and is_range(picked[0]))
    name = getattr(func, "__name__", "")
    if name not in _PICKING and name.removesuffix("_") not in _PICKING:
        return False
    dims = [value for value in (*args[1:2], kwargs.get("dim"), kwargs.get("dims")) if isinstance(value, int | tuple)]
    if len(dims) != 1 or name in ("repeat_interleave", "take", "put", "__setitem__"):
        return True
    chosen = (dims[0],) if isinstance(dims[0], int) else dims[0]
    return any(d % source.dim() == 0 for d in chosen)


#: Operations that take from their operand no more than its shape, dtype or device.
CREATES = {
    getattr(owner, name)
    for owner, names in (
        (Tensor, ("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor")),
        (torch, ("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like")),
    )
    for name in names
}


#: Operations that take no more than that from their second operand.
CONVERTS = {Tensor.to, Tensor.type_as}


def may_be_tried(func: Any, kwargs: Mapping[str, Any], output: Tensor, batch: int) -> bool:
    """Whether to run an operation once more for a single sample, to see where the samples are in its result."""
    name = getattr(func, "__name__", "")
    in_place = (name.endswith("_") and not name.endswith("__")) or "out" in kwargs
    picking = name in _PICKING or func is Tensor.__getitem__
    return not in_place and not picking and output.dim() > 0 and output.numel() % batch == 0


_BROADCASTING = {
    "add",
    "sub",
    "mul",
    "div",
    "true_divide",
    "pow",
    "maximum",
    "minimum",
    "where",
    "rsub",
    "__add__",
    "__radd__",
    "__sub__",
    "__rsub__",
    "__mul__",
    "__rmul__",
    "__truediv__",
    "__rtruediv__",
    "__rdiv__",
}


def adds_in_front(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation keeps the trailing dimensions and may add others in front of them."""
    if func is torch.stack:
        return bool(kwargs.get("dim", args[1] if len(args) > 1 else 0) == 0)
    return getattr(func, "__name__", "") in _BROADCASTING


_PARTS = {
    Tensor.chunk,
    torch.chunk,
    Tensor.split,
    torch.split,
    Tensor.unbind,
    torch.unbind,
    Tensor.narrow,
    torch.narrow,
    Tensor.select,
    torch.select,
}


def reorders(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation on one parameter only reorders, reshapes or leaves away its entries."""
    if func in RESHAPES or func in PERMUTES or func in _PARTS:
        return True
    if func is Tensor.__getitem__:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return all(isinstance(i, int | slice) or i is None or i is Ellipsis for i in index)
    if func is F.embedding and isinstance(args[0], Tensor):
        # Looking up each row at most once, as position embeddings do, is a slice in another order.
        return len(args) == 2 and kwargs.get("padding_idx") is None and args[0].unique().numel() == args[0].numel()
    return False


def expands(func: Any, operand: Tensor, result: Tensor) -> bool:
    """Whether the result of an operation is `operand` over and over along dim 0, and the same otherwise."""
    if func not in (Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.broadcast_to, Tensor.repeat):
        return False
    first, *others = [1] * (result.dim() - operand.dim()) + list(operand.shape)
    tiled = func is Tensor.repeat or first == 1
    return tiled and first > 0 and result.shape[0] % first == 0 and result.shape[1:] == torch.Size(others)
