"""Constants that are read or written at indices of samples: an entry belongs to the owner of its index."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from persample.sources.backends.fused import op_table
from persample.sources.backends.fused.arguments import substitute, tensors_in
from persample.sources.backends.fused.indexing import Lookup, is_mask, lookup_of, written_of
from persample.sources.backends.fused.owners import NOBODY, SEVERAL
from persample.sources.backends.fused.propagation.call import Call, Unknown
from persample.sources.backends.fused.propagation.labels import where_of
from persample.sources.backends.fused.propagation.lost import Where


def read_by_index(call: Call) -> list[Where]:
    """Constants are looked up by indices of samples: an entry of the result belongs to the owner of its index."""
    lookup = _read(lookup_of, call)
    if id(call.args[0]) in call.samples:
        raise Unknown
    owner = _owner_of_numbers(call, lookup.tensors.values())
    (shape,) = call.shapes()
    behind = len(shape) - lookup.before - owner.dim()
    return [where_of(call, owner.view([1] * lookup.before + list(owner.shape) + [1] * behind).expand(shape))]


def written_by_index(call: Call) -> list[Where]:
    """Constants are written at indices of samples: an entry belongs to the owner of its index."""
    lookup = _read(written_of, call)
    index = op_table.index_arguments(call.func, call.args, call.kwargs)[0]
    content = {id(t) for t in call.operands()} - {id(t) for t in tensors_in(index)}
    if content:
        raise Unknown
    numbers = list(lookup.tensors.values())
    if len(numbers) == 1 and is_mask(numbers[0]):  # what it hides belongs to its samples, too
        shown = torch.ones_like(numbers[0])
        owner = call.samples[id(numbers[0])].labels(shown.shape, shown.device).reshape(-1)
        index = substitute(index, {id(numbers[0]): shown})
    else:
        owner = _owner_of_numbers(call, numbers)
    labels = torch.full(call.args[0].shape, NOBODY, device=owner.device)
    behind = labels[index].dim() - lookup.before - owner.dim()
    labels[index] = owner.view(list(owner.shape) + [1] * behind)
    return [where_of(call, labels, nobody=None)]


def _read(reading: Callable[..., Lookup | None], call: Call) -> Lookup:
    try:
        lookup = reading(call.func, call.args, call.kwargs)
    except (RuntimeError, ValueError, TypeError) as error:
        raise Unknown from error
    if lookup is None:
        raise Unknown
    return lookup


def _owner_of_numbers(call: Call, numbers: Iterable[Tensor]) -> Tensor:
    """Return the owners of the index tensors and masks, broadcast against each other.

    Raises:
        Unknown: none is of a sample.
    """
    owners = []
    for given in numbers:
        layout = call.samples.get(id(given))
        if layout is None:
            owner = torch.full((), NOBODY, device=given.device).expand(given.shape)
        else:
            owner = layout.labels(given.shape, given.device)
        owners.append(owner[given.bool()] if is_mask(given) else owner)
    if all(id(given) not in call.samples for given in numbers):
        raise Unknown
    owner, *others = torch.broadcast_tensors(*owners)
    for other in others:
        owner = torch.where((owner == NOBODY) | (owner == other), other, torch.where(other == NOBODY, owner, SEVERAL))
    return owner
