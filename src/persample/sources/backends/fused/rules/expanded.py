"""Expanding a parameter to one copy per sample, for operations that combine it with samples.

Where an operation takes θ for all samples, it may as well take θ_1, …, θ_B, one for each, all equal to θ. Then autograd
gives δ_i, the gradient of θ_i, and g_i = δ_i. The copies are expanded, so they take no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from persample.sources.backends.contributions import Contribution, Terms
from persample.sources.backends.fused.arguments import substitute, tensors_in
from persample.sources.backends.fused.axis import Axis
from persample.sources.backends.fused.disjoint_rows import OwnRows, PickedRows
from persample.sources.backends.fused.expressions import Expression
from persample.sources.backends.fused.layout import Layout
from persample.sources.backends.fused.op_table import JOINING, name_of
from persample.sources.backends.fused.owners import NOBODY
from persample.sources.backends.fused.propagation.after import after
from persample.sources.backends.fused.propagation.by_name import agreed, aligned
from persample.sources.backends.fused.propagation.call import Call, Unknown
from persample.sources.backends.fused.rules.constants import as_samples
from persample.sources.backends.fused.rules.parts import follow, put_beside
from persample.sources.backends.fused.trace import Trace


def entry_by_entry(trace: Trace, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Operations entry by entry, on operands that are broadcast against each other."""
    operands = tensors_in((args, dict(kwargs)))
    shape = torch.broadcast_shapes(*(t.shape for t in operands))
    samples = trace.rows_in(args, kwargs)
    try:
        layout = agreed(samples, [t for t in operands if id(t) in samples], shape, aligned)
    except Unknown:
        values, named = trace.values((args, dict(kwargs)))
        where = after(Call(func, values, named, samples, trace.batch_size))[0]
        layout = trace.known(where, name_of(func), shape)
    axis = axis_in(layout, shape)
    copies = {id(t): copied(trace, t, len(shape), layout, axis) for t in operands if trace.expression(t) is not None}
    replaced = substitute((args, dict(kwargs)), copies)
    result = func(*replaced[0], **replaced[1])
    for output in tensors_in(result):
        trace.follow_as(output, layout)
    if trace.parts:
        follow(trace, func, args, kwargs, result)
    return result


def beside_each_other(trace: Trace, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """`torch.cat` and `torch.stack`: expanded parameters beside samples, such as a class token."""
    tensors = args[0] if args else kwargs["tensors"]
    beside = next(t for t in tensors if trace.expression(t) is None and id(t) in trace.samples_in(args, kwargs))
    layout = trace.layout(beside, "torch.cat")
    axis = axis_in(layout, beside.shape)
    dim = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
    dim = dim % (beside.dim() + JOINING[func])
    expressions = [t for t in tensors if trace.expression(t) is not None]
    whole = not JOINING[func] and dim == axis.dim and layout.rows > 1
    if whole:
        copies = {id(t): trace.of_nobody(t, func) for t in expressions}
    else:
        copies = {id(t): copied(trace, t, beside.dim(), layout, axis) for t in expressions}
    joined: Tensor = trace.again(func, args, kwargs, copies)
    put_beside(trace, func, tensors, dim, joined, samples=whole)
    return joined


def batched(trace: Trace, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Operations on the last two dimensions, with all before them broadcast, such as attention with learned queries."""
    operands = tensors_in((args, dict(kwargs)))
    samples = trace.samples_in(args, kwargs)
    largest = max((t for t in operands if id(t) in samples), key=Tensor.dim)
    layout = samples[id(largest)]
    axis = axis_in(layout, largest.shape)
    if axis.dim >= largest.dim() - 2:
        return trace.fall_back(func, args, kwargs)
    copies = {id(t): copied(trace, t, largest.dim(), layout, axis) for t in operands if trace.expression(t) is not None}
    return trace.again(func, args, kwargs, copies)


def own_of_one_sample(trace: Trace, args: Any, kwargs: Mapping[str, Any]) -> dict[int, Tensor]:
    """Return copies of the operands computed from parameters, if all other operands belong to one sample.

    Then the operation needs no rule: the copies are that sample's own.
    """
    operands = tensors_in((args, dict(kwargs)))
    layouts: list[Layout] = []
    for operand in operands:
        where = trace.layouts.get(operand)
        if isinstance(where, Layout) and where.owners is not None and where.rows == 1:
            layouts.append(where)
        elif where is not None:
            return {}
    owners = {int(layout.owners.labels) for layout in layouts if layout.owners is not None}
    if len(owners) != 1 or NOBODY in owners:
        return {}
    layout = layouts[0]
    return {id(t): copied(trace, t, t.dim(), layout, Axis(0)) for t in operands if trace.expression(t) is not None}


def copied(trace: Trace, operand: Tensor, ndim: int, layout: Layout, axis: Axis) -> Tensor:
    """Return `operand`, computed from parameters, expanded to an entry per sample and followed.

    Args:
        trace: sees the operation.
        operand: has size 1 where the samples are, or no such dimension, or an entry for each sample already.
        ndim: its dimensions are the last of so many.
        layout: where the samples are in another operand, with so many dimensions,
        axis: and in which of them.

    Raises:
        ValueError: the operand has another size there.
    """
    expression = trace.expressions[id(operand)][1]
    if layout.rows == 1:  # all is of one sample
        whole = Layout(1, layout.batch, operand.numel(), layout.owners)
        return trace.copies(expression.value, whole, expression, _of_own_rows(whole, Axis(0)))
    missing = ndim - operand.dim()
    own = axis._replace(dim=axis.dim - missing)
    size = layout.rows * axis.folded
    if own.dim < 0 or operand.shape[own.dim] == 1:
        shape = [1] * missing + list(operand.shape)
        values = expression.value.reshape(shape)
        shape[axis.dim] = size
        where = layout.at(axis, shape)
        return trace.copies(values.expand(shape), where, expression, _of_all(expression, layout, axis))
    if operand.shape[own.dim] != size:
        raise ValueError("it has neither one entry nor one for each sample where the samples are")
    where = layout.at(own, operand.shape)
    length = expression.repeats.get(own.dim)
    if length is not None and own.before == 1 and own.after % length == 0:
        once = expression.once(own.dim)
        trace.bypassed.add(expression)
        return trace.copies(expression.value, where, once, _of_repeated(once, layout, own))
    made = as_samples(trace, operand, where, own, copied)
    return trace.copies(expression.value, where, expression, _of_own_rows(where, own)) if made is None else made


def _of_own_rows(layout: Layout, axis: Axis) -> Callable[[Tensor], Contribution]:
    def contribution(delta: Tensor) -> Contribution:
        if layout.owners is None:
            return OwnRows(axis.sample_first(delta, layout.batch), axis, layout.batch)
        samples = torch.arange(layout.batch, device=delta.device)
        return PickedRows(delta, layout.labels(delta.shape, delta.device), samples)

    return contribution


def _of_all(expression: Expression, layout: Layout, axis: Axis) -> Callable[[Tensor], Contribution]:
    def contribution(delta: Tensor) -> Terms:
        parts = layout.by_sample(delta, axis)
        return Terms(parts.reshape(*parts.shape[:2], *expression.value.shape))

    return contribution


def _of_repeated(once: Expression, layout: Layout, axis: Axis) -> Callable[[Tensor], Contribution]:
    length = once.value.shape[axis.dim]

    def contribution(delta: Tensor) -> Terms:
        parts = layout.by_sample(delta, axis).unflatten(1, (-1, length))
        return Terms(parts.movedim(2, 2 + axis.dim))

    return contribution


def axis_in(layout: Layout, shape: torch.Size) -> Axis:
    """Return the dimension of `shape` that holds the samples.

    Raises:
        ValueError: no single one does.
    """
    axis = layout.axis(shape)
    if axis is None:
        raise ValueError("the samples are not in one dimension")
    return axis
