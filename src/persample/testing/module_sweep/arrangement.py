"""Where the samples are in the arguments and results of a module, found by calling it on single samples.

The list of PyTorch does not say which dimension of an argument is the sample, nor whether there is one. So the ways to
arrange a batch are tried one after the other. One fits if every result holds, along some dimension, what the module
gives for each sample alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_COPIES = 3  # as many samples are made where the arguments hold one


class DoesNotFitError(Exception):
    """The arguments cannot be arranged in this way; the message says why."""


class MixesError(DoesNotFitError):
    """The module runs on single samples, but gives something else there than in the batch."""


class Call:
    """The arguments of a call, flat, so that tensors which hold samples can be exchanged for others.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.

    Attributes:
        tensors: those that hold samples. Masks between positions are the same for all samples.
    """

    def __init__(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        leaves, self._structure = pytree.tree_flatten_with_path((list(args), kwargs))
        self._leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for _, leaf in leaves]
        self._places = [n for n, (path, x) in enumerate(leaves) if isinstance(x, Tensor) and not _is_common(path)]
        self.tensors: list[Tensor] = [self._leaves[place] for place in self._places]

    def __call__(self, module: nn.Module, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the floating-point results of `module`, with `tensors` in the places of this call's own."""
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        results = pytree.tree_leaves(module(*args, **kwargs))
        return [r for r in results if isinstance(r, Tensor) and r.is_floating_point()]


def _is_common(path: Any) -> bool:
    name = pytree.keystr(path)
    return "mask" in name and "padding" not in name


@dataclass(frozen=True)
class Arrangement:
    """One way to call a module on several samples.

    Attributes:
        call: the call.
        batch: its arguments, dim 0 of each is the sample.
        dims: where the module wants the sample in each of them; None to be called on one sample after the other.
        results: where the sample is in each result.
    """

    call: Call
    batch: tuple[Tensor, ...]
    dims: tuple[int, ...] | None
    results: tuple[int, ...] = ()

    def outputs(self, module: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        """Return all results of `module` for all samples, as a matrix with a row for each sample."""
        if self.dims is None:
            rows = [self.call(module, [x[i] for x in batch]) for i in range(len(batch[0]))]
            return torch.stack([torch.cat([r.reshape(-1) for r in row]) for row in rows])
        found = self.call(module, [x.movedim(0, dim) for x, dim in zip(batch, self.dims, strict=True)])
        size = len(batch[0])
        parts = [r.movedim(dim, 0).reshape(size, r.numel() // size) for r, dim in zip(found, self.results, strict=True)]
        return torch.cat(parts, dim=1)


def arrange(module: nn.Module, call: Call) -> Arrangement:
    """Return the most natural arrangement that fits.

    Raises:
        MixesError: none fits, and the module mixes the rows of its arguments as they are.
        DoesNotFitError: none fits; the message says why the first one does not.
    """
    reasons: list[DoesNotFitError] = []
    for dims, batched in _ways(call.tensors):
        mixing = [reason for reason in reasons if isinstance(reason, MixesError)]
        if dims is None and mixing and all(x.dim() > 0 for x in call.tensors):  # a number by itself has no rows to mix
            raise mixing[0]
        try:
            return _fitted(module, call, dims, batched)
        except DoesNotFitError as error:
            reasons.append(error)
    raise reasons[0] if reasons else DoesNotFitError("it takes no tensor of samples")


def _ways(tensors: Sequence[Tensor]) -> Iterator[tuple[tuple[int, ...] | None, bool]]:
    """Where the module may want the samples, and whether the arguments are a batch already."""
    if tensors:
        yield (0,) * len(tensors), True
        yield tuple(1 if x.dim() == 3 else 0 for x in tensors), True  # time first
        yield (0,) * len(tensors), False
        yield tuple(1 if x.is_floating_point() else 0 for x in tensors), False  # time first
        yield (0,) + (1,) * (len(tensors) - 1), False  # recurrent layers want their states as (layers, batch, width)
        yield None, False


def _fitted(module: nn.Module, call: Call, dims: tuple[int, ...] | None, batched: bool) -> Arrangement:
    places = dims or (0,) * len(call.tensors)
    if any(x.dim() + (not batched) <= dim for x, dim in zip(call.tensors, places, strict=True)):
        raise DoesNotFitError("an argument has no dimension for the samples")
    batch = tuple(_as_batch(x, dim, batched) for x, dim in zip(call.tensors, places, strict=True))
    if len({len(x) for x in batch}) != 1:
        raise DoesNotFitError("its arguments differ in length")
    if len(batch[0]) == 0:
        raise DoesNotFitError("it is called on a batch of no samples")
    alone = [
        [x[i : i + 1].movedim(0, dim) if batched else x[i] for x, dim in zip(batch, places, strict=True)]
        for i in range(len(batch[0]))
    ]
    rows = [_called(module, call, one) for one in alone]
    if dims is None:
        return Arrangement(call, batch, dims)
    together = _called(module, call, [x.movedim(0, dim) for x, dim in zip(batch, dims, strict=True)])
    return Arrangement(
        call, batch, dims, tuple(_sample_dim(*r, keep=batched) for r in zip(together, *rows, strict=True))
    )


def _as_batch(x: Tensor, dim: int, batched: bool) -> Tensor:
    """`x` with the samples in dim 0; where it holds a single one, others like it beside it."""
    batch = x.movedim(dim, 0) if batched else x.unsqueeze(0)
    if len(batch) != 1:
        return batch
    return torch.cat([batch * (1 - 0.1 * n) if x.is_floating_point() else batch for n in range(_COPIES)])


def _called(module: nn.Module, call: Call, tensors: Sequence[Tensor]) -> list[Tensor]:
    try:
        with torch.no_grad():
            results = call(copy.deepcopy(module), tensors)
    except (RuntimeError, ValueError, IndexError, AssertionError, TypeError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise DoesNotFitError(f"it does not run on single samples: {first_line}") from error
    if not results:
        raise DoesNotFitError("it returns no floating-point tensor")
    return results


def _sample_dim(together: Tensor, *rows: Tensor, keep: bool) -> int:
    """The dimension of `together` along which it holds `rows`, which have that dimension themselves if `keep`."""
    if together.dim() == 0:
        raise DoesNotFitError("it returns one number for the whole batch")
    for dim in range(together.dim()):
        parts = together.split(1, dim) if keep else together.unbind(dim)
        if len(parts) == len(rows) and all(map(_same, parts, rows)):
            return dim
    raise MixesError("it mixes the samples")


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, rtol=1e-9, atol=1e-12, equal_nan=True)
