"""Parameters beside samples in one tensor, such as a class token beside patches: tracking where they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from persample.sources.backends.fused.arguments import substitute, tensors_in
from persample.sources.backends.fused.op_table import JOINING, MOVES, POINTWISE, SAME, is_in_place
from persample.sources.backends.fused.parts import Parts, Whole
from persample.sources.backends.fused.trace import Trace


def put_beside(
    trace: Trace, func: Any, tensors: Sequence[Tensor], dim: int, joined: Tensor, samples: bool = False
) -> None:
    """Remember which of `tensors`, concatenated along `dim` by `func`, are computed from parameters.

    Args:
        trace: sees the operation.
        func: the operation.
        tensors: what it put beside each other.
        dim: the dimension.
        joined: its result.
        samples: whether to remember all of them.
    """
    lengths = [1 if JOINING[func] else t.shape[dim] for t in tensors]
    made = [samples or trace.expression(t) is not None for t in tensors]
    wholes = [
        _repeated(t, JOINING[func], dim, sum(lengths[:number]), joined.shape)
        for number, t in enumerate(tensors)
        if made[number]
    ]
    numbers = [sum(made[:number]) if made[number] else -1 for number in range(len(tensors))]
    repeated = [number for number, length in zip(numbers, lengths, strict=True) for _ in range(length)]
    along = torch.tensor(repeated).to(joined.device)
    shape = [-1 if d == dim else 1 for d in range(joined.dim())]
    trace.parts[joined] = Parts(along.view(shape).expand(joined.shape), wholes)


def _repeated(part: Tensor, new: bool, dim: int, start: int, shape: torch.Size) -> Whole:
    def whole(trace: Trace) -> Tensor:
        along: Tensor = trace.again(Tensor.unsqueeze, (part, dim), {}, {}) if new else part
        indices = (torch.arange(shape[dim], device=part.device) - start).clamp(0, along.shape[dim] - 1)
        func, args = (Tensor.expand, shape) if along.shape[dim] == 1 else (torch.index_select, (dim, indices))
        result: Tensor = trace.again(func, (along, *args), {}, {})
        return result

    return whole


def follow(trace: Trace, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
    """Carry the parts of one operand over to the result of an operation."""
    if func in JOINING or is_in_place(func):
        return
    tensors = tensors_in((args, dict(kwargs)))
    operand, known = next(((t, known) for t in tensors if (known := trace.parts.get(t)) is not None), (None, None))
    if operand is None or known is None or any(t in trace.layouts for t in tensors if t is not operand):
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
        def made(trace: Trace) -> Tensor:
            return tensors_in((trace.again(func, others, named, {id(stands_for): whole(trace)}),))[output]

        return made

    for output, (t, of_parts) in enumerate(zip(tensors_in((result,)), numbers, strict=True)):
        trace.parts[t] = Parts(of_parts, [made_of(whole, output) for whole in known.wholes])


def read(trace: Trace, result: Tensor) -> Tensor | None:
    """Return the part that the selected rows `result` come from; None if they span more than one.

    Nothing may be written into it, as it is no view.
    """
    parts = trace.parts.get(result) if result.numel() else None
    if parts is None or trace.intercepted or not trace.forward_pass or not torch.is_grad_enabled():
        return None
    number = int(parts.numbers.amin())
    if number < 0 or number != int(parts.numbers.amax()):
        return None
    with torch.random.fork_rng(devices=[result.device] if result.is_cuda else []):
        found = parts.wholes[number](trace)
    # What is random (dropout) is not the same again.
    if found.shape != result.shape or not torch.equal(trace.value(found).detach(), result.detach()):
        return None
    trace.parts.instead_of(result, found)
    return found
