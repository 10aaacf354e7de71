"""Running operations without parameters, and following the samples from operands to results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from persample.sources.backends.fused import op_table
from persample.sources.backends.fused.arguments import substitute, tensors_in
from persample.sources.backends.fused.layout import Layout
from persample.sources.backends.fused.op_table import name_of
from persample.sources.backends.fused.propagation.after import after
from persample.sources.backends.fused.propagation.call import Call, Unknown, outputs_of
from persample.sources.backends.fused.propagation.lost import Lost, Where
from persample.sources.backends.fused.propagation.pending import bound
from persample.sources.backends.fused.rules.parts import follow, read
from persample.sources.backends.fused.rules.pooling import FASTER
from persample.sources.backends.fused.trace import Trace
from persample.sources.selfcheck.raw_errors import is_raw


def plain(trace: Trace, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation without parameters, and follow the samples through it."""
    followed = [t for t in tensors_in((args, dict(kwargs))) if t in trace.layouts]
    return carry(trace, func, args, kwargs, followed) if followed else func(*args, **kwargs)


def carry(trace: Trace, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], followed: list[Tensor]) -> Any:
    """Run an operation without parameters, and follow the samples from its operands to its results."""
    result = FASTER.get(func, func)(*args, **kwargs)
    if trace.parts:
        follow(trace, func, args, kwargs, result)
    if op_table.gives_nothing_of_samples(func, args, kwargs):
        return result
    if _keeps_shape(trace, func, args, kwargs, followed, result):
        return result
    outputs = outputs_of(func, args, result)
    if not outputs:
        return result
    layouts = _after(trace, func, args, kwargs, followed, outputs)
    parts = _parts_read(trace, outputs, layouts) if trace.parts else {}
    if parts:
        result = substitute(result, parts)
        kept = [(output, where) for output, where in zip(outputs, layouts, strict=True) if id(output) not in parts]
        outputs, layouts = [output for output, _ in kept], [where for _, where in kept]
    for output, where in zip(outputs, layouts, strict=True):
        _note(trace, output, where, func)
    new = isinstance(result, Tensor) and not result._is_view() and all(result is not t for t in followed)
    if layouts == [None] and new and result.requires_grad and not trace.beside_samples:
        # Nothing of the samples was moved into it, as if their mask were empty: it is a constant.
        return result.detach()
    return result


def _keeps_shape(
    trace: Trace, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], followed: list[Tensor], result: Any
) -> bool:
    """Whether the operation's name tells that the samples stay where they were; if so, record that."""
    if func in op_table.SAME or func in op_table.RESHAPES:
        where = trace.layouts.get(args[0]) if args else None
        if where is None:
            return True
        if func in op_table.SAME or result.numel() == args[0].numel():
            trace.layouts[result] = where
            return True
    if func in op_table.SHAPE_KEEPING and len(followed) == 1 and "out" not in kwargs:
        (operand,) = followed
        if result is not operand and result.shape == operand.shape:
            trace.layouts[result] = trace.layouts.get(operand)
            return True
    return False


def _parts_read(trace: Trace, outputs: list[Tensor], layouts: Sequence[Where]) -> dict[int, Tensor]:
    """Return the replacements, by id, of those `outputs` that are a part computed from parameters."""
    found = {}
    for output, where in zip(outputs, layouts, strict=True):
        if trace.beside_samples or not isinstance(where, Layout) or where.owners is not None:
            part = read(trace, output)
            if part is not None:
                found[id(output)] = part
    return found


def _after(
    trace: Trace,
    func: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    followed: list[Tensor],
    outputs: list[Tensor],
) -> Sequence[Where]:
    layouts = {id(t): trace.layouts.get(t) for t in followed}
    samples = {key: where for key, where in layouts.items() if isinstance(where, Layout)}
    losses = [where for where in layouts.values() if isinstance(where, Lost)]
    lost = next((where for where in losses if where.mixed), losses[0] if losses else None)
    if func in op_table.RESHAPES_IN_PLACE:
        lost = Lost(f"{name_of(func)} gives a tensor another shape in place")
    elif lost is not None and lost.pending is not None:
        pending = {key: where.pending for key, where in layouts.items() if isinstance(where, Lost)}
        try:
            return bound(Call(func, args, kwargs, samples, trace.batch_size, outputs), pending)
        except Unknown:
            lost = lost._replace(pending=None)
    elif samples and (lost is None or not lost.mixed):
        try:
            return after(Call(func, args, kwargs, samples, trace.batch_size, outputs))
        except (TypeError, ValueError, IndexError, RuntimeError) as error:  # but the operation itself ran
            if not is_raw(error):
                raise
            lost = Lost(f"{name_of(func)} was not understood: {error}")
    return [lost for _ in outputs]


def _note(trace: Trace, output: Tensor, where: Where, func: Any) -> None:
    """Note where the samples are in a result."""
    if where is None or (isinstance(where, Lost) and not output.is_floating_point()):
        return  # it holds no samples, or has no gradient, so that it may as well be a constant
    base = output._base
    if base is not None and op_table.is_in_place(func) and trace.layouts.get(output) != where:
        trace.layouts[base] = Lost(f"{name_of(func)} writes samples into a part of a tensor")
    trace.layouts[output] = where
