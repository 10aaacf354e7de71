"""What the modules of a model hold, so that a change is seen quickly and can be undone."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from itertools import chain, filterfalse
from operator import is_, methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

from persample.sources.model.modules import Types, modules_of

_values = methodcaller("values")

LOOKED_INTO = Types(
    lambda kind: (
        issubclass(kind, (Tensor, list, dict, set, tuple, deque))
        and not issubclass(kind, (nn.Parameter, UninitializedBuffer, torch.Size))
    )
)
_DICTS = Types(lambda kind: issubclass(kind, dict))
_BESIDES_DICTS = Types(lambda kind: LOOKED_INTO[kind] and not _DICTS[kind])
TENSORS = Types(lambda kind: issubclass(kind, Tensor))
_CONTAINERS = Types(lambda kind: _BESIDES_DICTS[kind] and not TENSORS[kind])
_OTHERS = Types(lambda kind: _CONTAINERS[kind] and not issubclass(kind, tuple))


class Snapshot:
    """The entries of containers in flat lists, so that one comparison shows that nothing has changed.

    Most containers of a model are empty, those of its hooks, and most calls change nothing: both cost next to nothing.

    Args:
        dicts: containers with keys.
        others: lists, sets and deques.
    """

    def __init__(self, dicts: Collection[dict[Any, Any]], others: Collection[Any] = ()) -> None:
        self._empty = [*filterfalse(None, dicts), *filterfalse(None, others)]
        self._dicts, self._others = list(filter(None, dicts)), list(filter(None, others))
        self._lengths, self._keys, self._values = self._now()

    def _now(self) -> tuple[list[int], list[Any], list[Any]]:
        dicts, others = self._dicts, self._others
        values = [*chain.from_iterable(map(_values, dicts)), *chain.from_iterable(others)]
        return [*map(len, dicts), *map(len, others)], list(chain.from_iterable(dicts)), values

    def changed(self) -> bool:
        """Whether a container holds other entries, or another order.

        That is told by identity, as tensors give no answer to `==`.
        """
        if any(self._empty):
            return True
        lengths, keys, values = self._now()
        same = lengths == self._lengths and all(map(is_, keys, self._keys)) and all(map(is_, values, self._values))
        return not same

    def before(self) -> Iterator[tuple[Any, Any]]:
        """Yield each container with a copy of what it held."""
        for container in self._empty:
            yield container, {} if isinstance(container, dict) else []
        start = 0
        for container, length in zip((*self._dicts, *self._others), self._lengths, strict=True):
            part = slice(start, start + length)
            start += length
            values = self._values[part]
            keyed = isinstance(container, dict)
            yield container, dict(zip(self._keys[part], values, strict=True)) if keyed else values

    def put_back(self) -> None:
        """Restore the contents of each container in place."""
        if self.changed():
            for container, held in self.before():
                fill(container, held)


def fill(container: Any, entries: Any) -> None:
    """Set the contents of a container."""
    container.clear()
    container.update(entries) if isinstance(container, dict | set) else container.extend(entries)


class Held:
    """What the modules of a model hold, as it is now, by identity: attributes, and what containers among them hold.

    Args:
        model: the network.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(modules_of(model))
        own = [module._parameters for module in self.modules]
        self.parameters = list({id(p): p for table in own for p in table.values() if p is not None}.values())
        attributes = list(map(vars, self.modules))
        dicts, others, tensors = [*attributes, *map(vars, self.parameters)], [], []
        level = list(chain.from_iterable(map(_values, attributes)))
        inside, besides = _DICTS.select(level), _BESIDES_DICTS.select(level)
        met: set[int] = set()
        while inside or besides:
            dicts += inside
            others += _OTHERS.select(besides)
            tensors += TENSORS.select(besides)
            containers = chain(map(_values, filter(None, inside)), filter(len, _CONTAINERS.select(besides)))
            level = [value for value in chain.from_iterable(containers) if id(value) not in met]
            inside, besides = _DICTS.select(level), _BESIDES_DICTS.select(level)
            met.update(map(id, (*inside, *besides)))
        self.containers = Snapshot(dicts, others)
        self.tensors: list[Tensor] = tensors

    def changed(self) -> bool:
        """Whether something else is held, or in another order."""
        return self.containers.changed()

    def ids(self) -> set[int]:
        """Return the ids of the modules and of the containers."""
        return {*map(id, self.modules), *[id(container) for container, _ in self.containers.before()]}
