"""Rows that parameters and constants made, and that belong to samples once they meet rows of theirs."""

from __future__ import annotations

import math
from collections.abc import Mapping

from persample.sources.backends.fused import op_table
from persample.sources.backends.fused.arguments import tensors_in
from persample.sources.backends.fused.layout import Layout
from persample.sources.backends.fused.owners import NOBODY
from persample.sources.backends.fused.propagation.by_name import agreed, aligned
from persample.sources.backends.fused.propagation.call import Call, Unknown
from persample.sources.backends.fused.propagation.lost import Where, without_owner

_PARTS = op_table.functions("chunk split split_with_sizes unsafe_chunk unsafe_split narrow")


def bound(call: Call, pending: Mapping[int, Layout | None]) -> list[Where]:
    """Return the layout after `call`, in which rows without an owner may be combined with those of samples.

    Args:
        call: the operation.
        pending: the layouts of operands of which some rows have no owner yet, by their id; None for what is lost.

    Raises:
        Unknown: it does not tell who the owners are.
    """
    operands = [t for t in tensors_in(call.arguments) if id(t) in pending]
    waits = {key: layout for key, layout in pending.items() if layout is not None}
    first = waits[id(operands[0])] if len(waits) == len(pending) else None
    if first is None or first.owners is None or any(each.owners is not first.owners for each in waits.values()):
        raise Unknown
    if not call.samples:
        if call.func in _PARTS and len(operands) == 1 and first.outer == 1:
            size, shapes = len(operands[0]), call.shapes()
            if first.rows == size and all(shape[:1] == (size,) for shape in shapes):  # the rows stay whole
                return [without_owner(first._replace(inner=math.prod(shape[1:]))) for shape in shapes]
        raise Unknown
    if call.func not in op_table.SHAPE_KEEPING:
        raise Unknown
    (shape,) = call.shapes()
    layout = agreed(call.samples, call.operands(), shape, aligned)
    waiting = agreed(waits, operands, shape, aligned)
    if layout._replace(owners=None) != waiting._replace(owners=None) or layout.rows != waiting.rows:
        raise Unknown
    labels, known = layout.row_labels(first.owners.labels.device), first.owners.labels
    if not bool(((known == labels) | (known == NOBODY)).all()) or bool((labels == NOBODY).any()):
        raise Unknown
    first.owners.bind(labels)
    return [layout]
