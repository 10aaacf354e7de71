"""Entries that are accumulated at constant indices: a sum belongs to the common owner of its terms."""

from __future__ import annotations

import torch
from torch import Tensor

from persample.sources.backends.fused import op_table
from persample.sources.backends.fused.owners import NOBODY, SEVERAL
from persample.sources.backends.fused.propagation.call import Call, Unknown
from persample.sources.backends.fused.propagation.labels import where_of
from persample.sources.backends.fused.propagation.lost import Where

_ADDED = ("input", "dim", "index", "source")


def by_sums(call: Call) -> list[Where]:
    """Return the same for additions into a tensor by constant numbers along one dimension."""
    if call.func not in op_table.ADDITIONS or len(call.args) + len(call.kwargs.keys() & _ADDED) != 4:
        raise Unknown
    target, dim, index, added = (*call.args, *(call.kwargs[name] for name in _ADDED if name in call.kwargs))
    if id(index) in call.samples or target.dim() == 0 or added.dim() != target.dim():
        raise Unknown
    device, dim = target.device, dim % target.dim()
    if id(target) in call.samples:
        match [_along_dim(call, t, dim) for t in (target, added)]:
            case [Tensor() as owner, Tensor() as others] if _are_owners(owner[index.reshape(-1)], others):
                return [call.samples[id(target)]]
    nobody = torch.full((), NOBODY, device=device)
    labels = [
        call.samples[id(t)].labels(t.shape, device) if id(t) in call.samples else nobody.expand(t.shape)
        for t in (target, added)
    ]
    for d in range(target.dim()):
        if d != dim and all(label.stride(d) == 0 for label in labels):  # the same for all entries along it
            labels = [label.narrow(d, 0, min(1, label.shape[d])) for label in labels]
    if id(target) in call.samples:
        owner, others = torch.broadcast_tensors(labels[0].index_select(dim, index.reshape(-1)), labels[1])
        if _are_owners(owner, others):  # the rule: it belongs to whom it did
            return [call.samples[id(target)]]
    first, last = (
        _reduced(labels[0], dim, index, labels[1], reduction, others)
        for reduction, others in (("amin", call.batch), ("amax", NOBODY))
    )
    owner = torch.where((first == last) | (last == NOBODY), last, SEVERAL)
    return [where_of(call, owner.expand(target.shape), likely=[dim])]


def _along_dim(call: Call, tensor: Tensor, dim: int) -> Tensor | None:
    """Return the owners along one dimension of `tensor`, if they are the same along all others."""
    layout = call.samples.get(id(tensor))
    axis = None if layout is None else layout.axis(tensor.shape)
    if layout is None or axis is None or axis.dim != dim:
        return None
    rows = layout.row_labels(tensor.device)
    return rows if axis.folded == 1 else rows.view(1, -1, 1).expand(axis.before, -1, axis.after).reshape(-1)


def _are_owners(owner: Tensor, others: Tensor) -> bool:
    return torch.equal(owner, others) or bool((others == owner).logical_or(others == NOBODY).all())


def _reduced(labels: Tensor, dim: int, index: Tensor, added: Tensor, reduction: str, nobody: int) -> Tensor:
    """Return the smallest or largest label among the terms of each sum, with `nobody` for unowned terms."""
    known, others = (torch.where(t == NOBODY, nobody, t) for t in (labels, added))
    places = index.reshape([-1 if d == dim else 1 for d in range(labels.dim())]).expand(others.shape)
    return known.scatter_reduce(dim, places.long(), others, reduction)
