"""Operations without a rule of their own.

An operand that has an entry for each sample becomes samples itself, and the operation runs as it is. For one that is
the same for all samples, the operation's vector-Jacobian product is mapped over the samples by `torch.func`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from persample.errors import UnsupportedModelError
from persample.sources.backends.contributions import Contribution
from persample.sources.backends.fused.arguments import substitute, tensors_in
from persample.sources.backends.fused.axis import Axis
from persample.sources.backends.fused.expressions import Expression
from persample.sources.backends.fused.layout import Layout
from persample.sources.backends.fused.op_table import is_in_place, name_of
from persample.sources.backends.fused.propagation import Call, after
from persample.sources.backends.fused.rules.expanded import copied
from persample.sources.backends.fused.rules.in_place import change_samples
from persample.sources.backends.fused.rules.nondifferentiable import values_alone
from persample.sources.backends.fused.torch_function_bypass import opened
from persample.sources.backends.fused.trace import Trace
from persample.sources.backends.fused.vjp import Mapped, MappedRows, no_rule
from persample.sources.selfcheck.tolerances import tolerance


def fallback(capture: Trace, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run `func`, which has no rule, on samples and parameters."""
    rows = _rows(capture, func, args, kwargs, lambda expression, dim: dim in expression.repeats)
    if rows:
        return capture.again(func, args, kwargs, rows)
    if is_in_place(func):
        return change_samples(capture, func, args, kwargs)
    inside = opened(func)
    if inside is not None:
        return capture.again(inside, args, kwargs, {})
    try:
        return _mapped(capture, func, args, kwargs)
    except UnsupportedModelError:
        rows = _rows(capture, func, args, kwargs, lambda expression, dim: True)
        if not rows:
            raise
        return capture.again(func, args, kwargs, rows)


def _rows(
    capture: Trace,
    func: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    wanted: Callable[[Expression, int], bool],
) -> dict[int, Tensor]:
    """Return, as samples, the operands made of parameters that have entries for the samples where others have them.

    None if the operation would mix the samples then: those entries are as many as the samples by chance.
    """
    operands = {id(t): t for t in tensors_in((args, dict(kwargs)))}
    samples = capture.samples_in(args, kwargs)
    known = [(layout, layout.axis(operands[key].shape)) for key, layout in samples.items()]
    axes = {}
    for key, operand in operands.items():
        expression = capture.expression(operand)
        for layout, axis in known:
            if expression is None or axis is None or axis.dim >= operand.dim():
                continue
            if operand.shape[axis.dim] == layout.rows * axis.folded and wanted(expression, axis.dim):
                axes[key] = layout, axis
    if not axes:
        return {}
    rows = {id(operands[key]): layout.at(axis, operands[key].shape) for key, (layout, axis) in axes.items()}
    in_order = all(layout.owners is None for layout in samples.values())
    for where in after(Call(func, args, kwargs, samples | rows, capture.batch_size)):
        if not isinstance(where, Layout) or (where.owners is None) != in_order:
            return {}
    return {key: copied(capture, operands[key], operands[key].dim(), *where) for key, where in axes.items()}


def _mapped(capture: Trace, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run `func`, and tap its result."""
    name = name_of(func)
    operands = {id(t): t for t in tensors_in((args, dict(kwargs)))}
    expressions = {key: e for key, t in operands.items() if (e := capture.expression(t)) is not None}
    samples = capture.samples_in(args, kwargs)
    axes = {}
    for key, layout in samples.items():
        axis = layout.axis(operands[key].shape)
        if axis is None:
            raise no_rule(name, "the samples are not in one dimension")
        axes[key] = axis
    labels = _labels(name, samples.values())
    batch = capture.batch_size if labels is None else len(labels)  # rows are taken for samples

    def run(given: Mapping[int, Tensor]) -> Any:
        replaced = substitute((args, dict(kwargs)), given)
        return func(*replaced[0], **replaced[1])

    values = {key: e.value for key, e in expressions.items()}
    result = run(values)
    if isinstance(result, Tensor) and not (result.is_floating_point() or result.is_complex()):
        return values_alone(capture, func, args, kwargs)
    if not isinstance(result, Tensor):
        raise no_rule(name, "its result is not a tensor")
    args_of_values, kwargs_of_values = substitute((args, dict(kwargs)), values)
    where = after(Call(func, args_of_values, kwargs_of_values, samples, capture.batch_size, [result]))[0]
    layout = capture.known(where, name, result.shape)
    at = layout.axis(result.shape)

    def run_alone(row: int) -> Any:
        return run(values | {key: axes[key].sample_first(operands[key].detach(), batch)[row] for key in axes})

    # Rows that were picked may be several of one sample, which must not meet either.
    tried = (-1,) if labels is None else (0, -1)
    if (
        at is None
        or not _same(_labels(name, [layout]), labels)
        or not all(_is_part(result, at, batch, row, run_alone) for row in tried)
    ):
        raise no_rule(name, "its result for a sample alone is not that sample's part of its result for the batch")

    def contribution_of(key: int) -> Callable[..., Contribution]:
        def operation(theta: Tensor, *parts: Tensor) -> Any:
            return run(values | {key: theta} | dict(zip(axes, parts, strict=True)))

        def contribution(delta: Tensor, *saved: Tensor) -> Contribution:
            parts = tuple(axis.sample_first(x, batch) for axis, x in zip(axes.values(), saved, strict=True))
            mapped = Mapped(operation, values[key], parts, at.sample_first(delta, batch), name)
            return mapped if labels is None else MappedRows(mapped, labels, 0, capture.batch_size)

        return contribution

    uses = [(expression, contribution_of(key)) for key, expression in expressions.items()]
    return capture.tap(result.clone(), layout, uses, tuple(operands[key] for key in axes))


def _labels(name: str, layouts: Iterable[Layout]) -> Tensor | None:
    """Return whose the rows are in all of `layouts`; None where row i is sample i."""
    first, *others = [None if layout.owners is None else layout.owners.labels for layout in layouts]
    if not all(_same(first, labels) for labels in others):
        raise no_rule(name, "the samples are in different orders in its operands")
    return first


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)


def _is_part(result: Tensor, at: Axis, batch: int, row: int, run_alone: Callable[[int], Tensor]) -> bool:
    """Whether a sample alone, that in `row`, gives its part of the result for the batch."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[result.device] if result.is_cuda else []):
            alone = run_alone(row)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    result = result.detach()
    part, allowed = at.sample_first(result, batch)[row], tolerance(result)
    return alone.shape == part.shape and torch.allclose(alone, part, rtol=allowed, atol=allowed, equal_nan=True)
