"""Constants with an entry for each sample, such as positions looked up as `(B, T)`, or the token types of BERT.

What is made of them and of parameters has entries for the samples, too, each of which depends on all parameters. So it
is made once more where samples meet it, with the constants taken for samples. Then each parameter has the ordinary rule
of its operation, at a cost that grows as B; as an expression it would cost B times as much.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from persample.errors import UnsupportedModelError
from persample.sources.backends.fused.arguments import tensors_in
from persample.sources.backends.fused.axis import Axis
from persample.sources.backends.fused.expressions import Made, version_of
from persample.sources.backends.fused.layout import Layout
from persample.sources.backends.fused.propagation.after import after
from persample.sources.backends.fused.propagation.call import Call
from persample.sources.backends.fused.trace import Trace
from persample.sources.selfcheck.tolerances import tolerance

Copied = Callable[[Trace, Tensor, int, Layout, Axis], Tensor]


def as_samples(trace: Trace, operand: Tensor, where: Layout, axis: Axis, copied: Copied) -> Tensor | None:
    """Return `operand`, an expression with an entry for each sample, as a tensor of samples; None if impossible.

    Args:
        trace: sees the operation.
        operand: the expression.
        where: where it has its entries for the samples,
        axis: and in which dimension.
        copied: gives expressions an entry for each sample.
    """
    made = trace.expressions[id(operand)][1].made
    if made is None or where.owners is not None or trace.intercepted or not trace.forward_pass:
        return None
    key = (id(operand), where)
    if key not in trace.remade:
        result = _remade(trace, made, operand, where, axis, copied)
        trace.remade[key] = None if result is None else (result, version_of(result))
    known = trace.remade[key]
    return None if known is None or version_of(known[0]) != known[1] else known[0]


def _remade(trace: Trace, made: Made, operand: Tensor, where: Layout, axis: Axis, copied: Copied) -> Tensor | None:
    axes = _axes(trace, made, operand.dim(), where, axis)
    if not axes:
        return None
    operands = {id(t): t for t in tensors_in((made.args, dict(made.kwargs)))}
    layouts = {key: where.at(at, operands[key].shape) for key, at in axes.items()}
    if after(Call(made.func, made.args, made.kwargs, layouts, where.batch))[made.number or 0] != where:
        return None
    expression = trace.expressions[id(operand)][1]
    devices = [operand.device] if operand.is_cuda else []
    try:
        with torch.random.fork_rng(devices=devices):  # what is random is no longer the same, and so is left alone
            samples = {
                key: copied(trace, operands[key], operands[key].dim(), layouts[key], at)
                if key in made.sources
                else trace.follow_as(operands[key].detach(), layouts[key])
                for key, at in axes.items()
            }
            result = trace.again(made.func, made.args, made.kwargs, samples)
    except UnsupportedModelError:
        return None
    if made.number is not None:
        result = result[made.number]
    if result.shape != operand.shape or trace.layouts.get(result) != where or not _same(result, expression.value):
        return None
    trace.bypassed.add(expression)
    remade: Tensor = result
    return remade


def _same(result: Tensor, expected: Tensor) -> bool:
    """Whether it was the same once more. A step that is being recorded has no values, but is compared as a whole."""
    allowed = tolerance(expected)
    return isinstance(expected, FakeTensor) or torch.allclose(
        result.detach(), expected, allowed, allowed, equal_nan=True
    )


def _axes(trace: Trace, made: Made, ndim: int, where: Layout, axis: Axis) -> dict[int, Axis]:
    """Return where the operands have entries for the samples, by id; empty if one of them has changed."""
    axes = {}
    for t in tensors_in((made.args, dict(made.kwargs))):
        source = made.sources.get(id(t))
        if source is None:
            if t.requires_grad or t in trace.layouts or version_of(t) != made.versions[id(t)]:
                return {}
        elif source is not trace.expression(t):
            return {}
        if source is None or not source.is_parameter:
            at = _axis(t, ndim, where, axis)
            if at is not None:
                axes[id(t)] = at
    return axes


def _axis(t: Tensor, ndim: int, where: Layout, axis: Axis) -> Axis | None:
    """Return the likely dimension of the samples: that of the result, counted from the end or the start."""
    likely = (axis.dim - ndim + t.dim(), axis.dim, *range(t.dim()))
    for parts in (axis, Axis(0)):
        for dim in likely:
            if 0 <= dim < t.dim() and t.shape[dim] == where.rows * parts.folded:
                return parts._replace(dim=dim)
    return None
