"""The owner of each entry: of the operands of an operation, and read off those of its result."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from persample.sources.backends.fused.axis import Axis
from persample.sources.backends.fused.layout import Layout, Write, of_rows, rows_in, without_gaps
from persample.sources.backends.fused.op_table import name_of
from persample.sources.backends.fused.owners import ALL, NOBODY, SEVERAL
from persample.sources.backends.fused.propagation.call import Call
from persample.sources.backends.fused.propagation.lost import NO_TRACE, Lost, Where


def labels_of(call: Call, write: Write = lambda rows: rows, leave: Collection[int] = ()) -> dict[int, Tensor]:
    """Return the owner of each entry of the operands that hold samples, by the operand's id.

    Args:
        call: the operation.
        write: codes the owners of rows.
        leave: the ids of operands that are left out.
    """
    return {id(t): call.samples[id(t)].labels(t.shape, t.device, write) for t in call.operands() if id(t) not in leave}


def of_all(call: Call, shape: torch.Size) -> Lost:
    """Return the answer for a result of which each entry depends on all samples."""
    return Lost(f"{name_of(call.func)} computes an entry of its result from all of them", mixed=shape.numel() > 1)


def where_of(
    call: Call,
    labels: Tensor,
    read: Write = lambda rows: rows,
    nobody: Where = NO_TRACE,
    likely: Sequence[int] = (),
) -> Where:
    """Return where the samples are in a result.

    Args:
        call: the operation.
        labels: the owner of each entry of the result, coded in some way.
        read: decodes them.
        nobody: the answer if no entry belongs to a sample.
        likely: the dimensions along which a sample's entries likely are, if some belong to nobody.
    """
    if labels.numel() == 0:
        return Layout(1, call.batch, 0)
    outer, rows, inner = rows_in(labels)
    rows = read(rows)
    picked = any(layout.owners is not None for layout in call.samples.values())
    if bool((rows == SEVERAL).any()) or (bool((rows == ALL).any()) and (picked or len(call.operands()) > 1)):
        return Lost(
            f"{name_of(call.func)} computes an entry of its result from several of them", mixed=True, picked=picked
        )
    if bool((rows == ALL).any()):
        return of_all(call, labels.shape)
    if not bool((rows != NOBODY).any()):
        return nobody
    if bool((rows == NOBODY).any()):
        outer, rows, inner = rows_in(without_gaps(read(labels), likely or [axis.dim for axis in _axes(call)]))
    return of_rows(outer, rows, inner, call.batch)


def _axes(call: Call) -> Iterable[Axis]:
    """Where the operands hold samples, if each is in one dimension."""
    axes = (call.samples[id(operand)].axis(operand.shape) for operand in call.operands())
    return (axis for axis in axes if axis is not None)
