"""Operations without a rule of their own.

An operand that has an entry for each sample becomes samples itself, and the operation runs as it is. For one that is
the same for all samples, the operation's vector-Jacobian product is mapped over the samples by `torch.func`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from persample.errors import UnsupportedModelError
from persample.sources.backends.contributions import Contribution
from persample.sources.backends.fused.arguments import substitute, tensors_in
from persample.sources.backends.fused.axis import Axis
from persample.sources.backends.fused.expressions import Expression
from persample.sources.backends.fused.layout import Layout
from persample.sources.backends.fused.op_table import is_in_place, name_of
from persample.sources.backends.fused.propagation.after import after
from persample.sources.backends.fused.propagation.call import Call
from persample.sources.backends.fused.rules.expanded import copied
from persample.sources.backends.fused.rules.in_place import change_samples
from persample.sources.backends.fused.rules.nondifferentiable import values_alone
from persample.sources.backends.fused.torch_function_bypass import opened
from persample.sources.backends.fused.trace import Trace
from persample.sources.backends.fused.vjp import Mapped, MappedRows, no_rule
from persample.sources.selfcheck.tolerances import tolerance


def fallback(trace: Trace, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run `func`, which has no rule, on samples and parameters."""
    rows = _rows(trace, func, args, kwargs, lambda expression, dim: dim in expression.repeats)
    if rows:
        return trace.again(func, args, kwargs, rows)
    if is_in_place(func):
        return change_samples(trace, func, args, kwargs)
    inside = opened(func)
    if inside is not None:
        return trace.again(inside, args, kwargs, {})
    try:
        return _mapped(trace, func, args, kwargs)
    except UnsupportedModelError:
        rows = _rows(trace, func, args, kwargs, lambda expression, dim: True)
        if not rows:
            raise
        return trace.again(func, args, kwargs, rows)


def _rows(
    trace: Trace,
    func: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    wanted: Callable[[Expression, int], bool],
) -> dict[int, Tensor]:
    """Return, as samples, the operands computed from parameters with entries for the samples where others have them.

    None if the operation would mix the samples then: those entries are as many as the samples by chance.
    """
    operands = {id(t): t for t in tensors_in((args, dict(kwargs)))}
    samples = trace.samples_in(args, kwargs)
    known = [(layout, layout.axis(operands[key].shape)) for key, layout in samples.items()]
    axes = {}
    for key, operand in operands.items():
        expression = trace.expression(operand)
        for layout, axis in known:
            if expression is None or axis is None or axis.dim >= operand.dim():
                continue
            if operand.shape[axis.dim] == layout.rows * axis.folded and wanted(expression, axis.dim):
                axes[key] = layout, axis
    if not axes:
        return {}
    rows = {id(operands[key]): layout.at(axis, operands[key].shape) for key, (layout, axis) in axes.items()}
    in_order = all(layout.owners is None for layout in samples.values())
    for where in after(Call(func, args, kwargs, samples | rows, trace.batch_size)):
        if not isinstance(where, Layout) or (where.owners is None) != in_order:
            return {}
    return {key: copied(trace, operands[key], operands[key].dim(), *where) for key, where in axes.items()}


def _mapped(trace: Trace, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run `func`, and tap its result."""
    operation = _Operation(trace, func, args, kwargs)
    result = operation.run({})
    if isinstance(result, Tensor) and not (result.is_floating_point() or result.is_complex()):
        return values_alone(trace, func, args, kwargs)
    if not isinstance(result, Tensor):
        raise no_rule(operation.name, "its result is not a tensor")
    where = after(operation.call_of_values(result))[0]
    layout = trace.known(where, operation.name, result.shape)
    at = layout.axis(result.shape)
    if at is None or not operation.is_of_single_rows(result, layout, at):
        raise no_rule(
            operation.name, "its result for one sample differs from that sample's part of its result for the batch"
        )
    uses = [(expression, operation.contribution_of(key, at)) for key, expression in operation.expressions.items()]
    return trace.tap(result.clone(), layout, uses, operation.samples())


class _Operation:
    """An operation without a rule, on parameters and samples.

    Args:
        trace: sees it.
        func: the operation.
        args: its positional arguments,
        kwargs: and its keyword arguments.

    Raises:
        UnsupportedModelError: the samples are not in one dimension of each operand, and in the same order.
    """

    def __init__(self, trace: Trace, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.func, self.arguments, self.name = func, (args, dict(kwargs)), name_of(func)
        self.batch_size = trace.batch_size
        self.operands = {id(t): t for t in tensors_in(self.arguments)}
        self.expressions = {key: e for key, t in self.operands.items() if (e := trace.expression(t)) is not None}
        self.values = {key: e.value for key, e in self.expressions.items()}
        self.layouts = trace.samples_in(args, kwargs)
        self.axes = {key: self._axis(layout, self.operands[key]) for key, layout in self.layouts.items()}
        self.labels = _labels(self.name, self.layouts.values())
        self.rows = self.batch_size if self.labels is None else len(self.labels)  # they are taken for samples

    def _axis(self, layout: Layout, operand: Tensor) -> Axis:
        axis = layout.axis(operand.shape)
        if axis is None:
            raise no_rule(self.name, "the samples are not in one dimension")
        return axis

    def samples(self) -> tuple[Tensor, ...]:
        """Return the operands that hold samples."""
        return tuple(self.operands[key] for key in self.axes)

    def run(self, given: dict[int, Tensor]) -> Any:
        """Run the operation on the values of parameters, with the operands in `given` replaced."""
        args, kwargs = substitute(self.arguments, self.values | given)
        return self.func(*args, **kwargs)

    def call_of_values(self, result: Tensor) -> Call:
        """Return the call that gave `result`."""
        args, kwargs = substitute(self.arguments, self.values)
        return Call(self.func, args, kwargs, self.layouts, self.batch_size, [result])

    def is_of_single_rows(self, result: Tensor, layout: Layout, at: Axis) -> bool:
        """Whether each row of `result` is the operation's result for that row alone."""
        # Rows that were picked may be several of one sample, which must not meet either.
        tried = (-1,) if self.labels is None else (0, -1)
        return _same(_labels(self.name, [layout]), self.labels) and all(self._is_part(result, at, row) for row in tried)

    def _is_part(self, result: Tensor, at: Axis, row: int) -> bool:
        given = {key: axis.sample_first(self.operands[key].detach(), self.rows)[row] for key, axis in self.axes.items()}
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[result.device] if result.is_cuda else []):
                alone = self.run(given)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False
        result = result.detach()
        part, allowed = at.sample_first(result, self.rows)[row], tolerance(result)
        if alone.shape != part.shape:
            return False
        # Without values, while a step is recorded, it is what it was in the ordinary call before.
        return isinstance(alone, FakeTensor) or torch.allclose(alone, part, rtol=allowed, atol=allowed, equal_nan=True)

    def contribution_of(self, key: int, at: Axis) -> Callable[..., Contribution]:
        """Return a function from δ, with samples at axis `at`, to the contribution of operand `key`."""

        def of_one(theta: Tensor, *parts: Tensor) -> Any:
            return self.run({key: theta} | dict(zip(self.axes, parts, strict=True)))

        def contribution(delta: Tensor, *saved: Tensor) -> Contribution:
            parts = tuple(axis.sample_first(x, self.rows) for axis, x in zip(self.axes.values(), saved, strict=True))
            mapped = Mapped(of_one, self.values[key], parts, at.sample_first(delta, self.rows), self.name)
            return mapped if self.labels is None else MappedRows(mapped, self.labels, 0, self.batch_size)

        return contribution


def _labels(name: str, layouts: Iterable[Layout]) -> Tensor | None:
    """Return the owners of the rows in all of `layouts`; None if row i is sample i."""
    first, *others = [None if layout.owners is None else layout.owners.labels for layout in layouts]
    if not all(_same(first, labels) for labels in others):
        raise no_rule(name, "its operands hold the samples in different orders")
    return first


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)
