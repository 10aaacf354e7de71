"""Parts of tensors of samples that are made of parameters alone, such as a class token beside patches.

Rows that are read from such a part are made of parameters again, whose samples' rows they may be: a model of frames
takes the class token of all videos from the first B of its B·T frames. So what was put beside samples is remembered,
through operations that move entries or act on each of them, until rows are picked.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from persample.errors import UnsupportedModelError
from persample.sources.backends.fused.arguments import substitute, tensors_in
from persample.sources.backends.fused.expressions import version_of
from persample.sources.backends.fused.op_table import JOINING, MOVES, POINTWISE, SAME, is_in_place

if TYPE_CHECKING:
    from persample.sources.backends.fused.capture import Capture

Whole = Callable[["Capture"], Tensor]
"""Makes an expression of the shape of a tensor, which has a part's entries where the part is."""


class Parts(NamedTuple):
    """The parts of a tensor.

    Attributes:
        numbers: which part each of its entries is of; -1 for samples. An expanded tensor, which takes no memory.
        wholes: what makes each part. It is given the capture, to which nothing refers back.
    """

    numbers: Tensor
    wholes: Sequence[Whole]


class Seen:
    """The parts of tensors, found by the tensor's identity; no tensor is kept alive by it."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], int, Parts]] = {}
        self._read: list[tuple[Tensor, int]] = []

    def __bool__(self) -> bool:
        return bool(self._entries)

    def __setitem__(self, tensor: Tensor, parts: Parts) -> None:
        self._entries[id(tensor)] = weakref.ref(tensor), version_of(tensor), parts

    def get(self, tensor: Tensor) -> Parts | None:
        """Return the parts of `tensor`; None if it has none, or was written into."""
        entry = self._entries.get(id(tensor))
        if entry is None or entry[0]() is not tensor or version_of(tensor) != entry[1]:
            return None
        return entry[2]

    def instead_of(self, view: Tensor, part: Tensor) -> None:
        """Remember that `part` stands for a view; both must stay as they are."""
        self._read += [(t, version_of(t)) for t in (view, part)]

    def refuse_written(self) -> None:
        """Raise if something was written into a tensor that expressions were read from."""
        if any(version_of(view) != version for view, version in self._read):
            raise UnsupportedModelError(
                "A tensor in which parameters stand beside samples (a class token), or a part of it, was changed in "
                "place after rows had been read from it, which backend 'fused' cannot follow: read them later, or use "
                "an operation that returns a new tensor."
            )


def put_beside(
    capture: Capture, func: Any, tensors: Sequence[Tensor], dim: int, joined: Tensor, samples: bool = False
) -> None:
    """Remember which of `tensors`, which `func` put beside each other along `dim`, are made of parameters.

    Args:
        capture: sees the operation.
        func: the operation.
        tensors: what it put beside each other.
        dim: the dimension.
        joined: its result.
        samples: whether to remember all of them.
    """
    lengths = [1 if JOINING[func] else t.shape[dim] for t in tensors]
    made = [samples or capture.expression(t) is not None for t in tensors]
    wholes = [
        _repeated(t, JOINING[func], dim, sum(lengths[:number]), joined.shape)
        for number, t in enumerate(tensors)
        if made[number]
    ]
    numbers = [sum(made[:number]) if made[number] else -1 for number in range(len(tensors))]
    along = torch.tensor(numbers).repeat_interleave(torch.tensor(lengths)).to(joined.device)
    shape = [-1 if d == dim else 1 for d in range(joined.dim())]
    capture.parts[joined] = Parts(along.view(shape).expand(joined.shape), wholes)


def _repeated(part: Tensor, new: bool, dim: int, start: int, shape: torch.Size) -> Whole:
    def whole(capture: Capture) -> Tensor:
        along: Tensor = capture.again(Tensor.unsqueeze, (part, dim), {}, {}) if new else part
        places = (torch.arange(shape[dim], device=part.device) - start).clamp(0, along.shape[dim] - 1)
        func, args = (Tensor.expand, shape) if along.shape[dim] == 1 else (torch.index_select, (dim, places))
        result: Tensor = capture.again(func, (along, *args), {}, {})
        return result

    return whole


def follow(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
    """Remember that an operation made the parts of its result from those of one operand."""
    if func in JOINING or is_in_place(func):
        return
    tensors = tensors_in((args, dict(kwargs)))
    operand, known = next(((t, known) for t in tensors if (known := capture.parts.get(t)) is not None), (None, None))
    if operand is None or known is None or any(t in capture.layouts for t in tensors if t is not operand):
        return
    if func in MOVES and operand is args[0]:
        try:
            numbers = tensors_in((func(known.numbers, *args[1:], **kwargs),))
        except (RuntimeError, ValueError, IndexError, TypeError):
            return
    elif (func in POINTWISE or func in SAME) and result.shape == operand.shape:
        numbers = [known.numbers]
    else:
        return
    stands_for = torch.empty(0)  # `operand` would be kept in memory
    others, named = substitute((args, dict(kwargs)), {id(operand): stands_for})

    def made_of(whole: Whole, output: int) -> Whole:
        def made(capture: Capture) -> Tensor:
            return tensors_in((capture.again(func, others, named, {id(stands_for): whole(capture)}),))[output]

        return made

    for output, (t, of_parts) in enumerate(zip(tensors_in((result,)), numbers, strict=True)):
        capture.parts[t] = Parts(of_parts, [made_of(whole, output) for whole in known.wholes])


def read(capture: Capture, result: Tensor) -> Tensor | None:
    """Return the part that `result` is, rows that were picked; None if they are more than a part.

    Nothing may be written into it, as it is no view.
    """
    parts = capture.parts.get(result) if result.numel() else None
    if parts is None or capture.intercepted or not capture.forward_pass or not torch.is_grad_enabled():
        return None
    number = int(parts.numbers.amin())
    if number < 0 or number != int(parts.numbers.amax()):
        return None
    with torch.random.fork_rng(devices=[result.device] if result.is_cuda else []):
        found = parts.wholes[number](capture)
    # What is random (dropout) is not the same again.
    if found.shape != result.shape or not torch.equal(capture.value(found).detach(), result.detach()):
        return None
    capture.parts.instead_of(result, found)
    return found
