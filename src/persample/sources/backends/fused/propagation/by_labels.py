"""Operations that only move entries, run on tensors that hold the owner of each entry."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from persample.sources.backends.fused import op_table
from persample.sources.backends.fused.arguments import substitute, tensors_in
from persample.sources.backends.fused.owners import NOBODY
from persample.sources.backends.fused.propagation.call import Call, Unknown
from persample.sources.backends.fused.propagation.labels import labels_of, where_of
from persample.sources.backends.fused.propagation.lost import Where

_MARK = 2.0**45  # far from all values that paddings have, and exact in float64 together with any sample's number


def by_labels(call: Call) -> list[Where]:
    """Return the same by where the operation moves the numbers of samples."""
    if call.func not in op_table.MOVES or _adds(call):
        raise Unknown
    indices = {id(t) for t in tensors_in(op_table.index_arguments(call.func, call.args, call.kwargs))}
    labels = labels_of(call, _marked, leave=indices)
    if not labels:
        raise Unknown
    if op_table.is_in_place(call.func):
        labels = {key: label.clone(memory_format=torch.contiguous_format) for key, label in labels.items()}
    try:
        with torch.no_grad():
            results = _moved(call, labels, indices)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise Unknown from error
    return [where_of(call, result, lambda rows: _unmarked(rows, call.batch), nobody=None) for result in results]


def _adds(call: Call) -> bool:
    """Whether entries are accumulated, not overwritten."""
    return bool(call.kwargs.get("accumulate", call.kwargs.get("reduce"))) or any(item is True for item in call.args[3:])


def _marked(owners: Tensor) -> Tensor:
    """Return sample numbers coded as values that occur nowhere else in a tensor."""
    return owners.double() + _MARK


def _unmarked(values: Tensor, batch: int) -> Tensor:
    """Return the numbers of the samples that `_marked` wrote, and `NOBODY` for other values."""
    owners = values.double() - _MARK
    return torch.where((owners >= 0) & (owners < batch), owners, NOBODY).long()


def _moved(call: Call, labels: Mapping[int, Tensor], indices: set[int]) -> list[Tensor]:
    """Return the results of an operation that only moves entries, on marked labels.

    Args:
        call: the operation.
        labels: the marked owners of its operands' entries, by the operand's id; other operands belong to nobody.
        indices: the ids of operands that say where entries go.
    """
    content = [t for t in tensors_in(call.arguments) if id(t) not in labels and id(t) not in indices]
    others = {id(t): t.detach().to(torch.float64, copy=True) for t in content}
    return call.run(substitute(call.arguments, others | dict(labels)))
