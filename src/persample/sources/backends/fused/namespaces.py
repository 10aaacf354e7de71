"""What classes, objects and Python's modules define, so that a change is seen: another method, a name that is new."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch

_version = torch._C._dynamo.guards.dict_version  # changes with every change of a dict


class Namespaces:
    """Classes, objects and modules, and what is seen of each, as it is when it is added."""

    def __init__(self) -> None:
        self._dicts: list[dict[Any, Any]] = []
        self._versions: list[int] = []
        self._seen: list[tuple[Callable[[dict[Any, Any]], Any], Any]] = []

    def add_class(self, kind: type) -> None:
        """Add a class and its bases: the names that it defines, and its methods, but not other values."""
        for base in kind.__mro__:
            (entries,) = gc.get_referents(vars(base))  # behind the read-only view
            self._add(entries, _methods)

    def add_names(self, entries: dict[Any, Any], names: Iterable[Any]) -> None:
        """Add what an object or a module has as its dict: which of these names it defines."""
        asked = frozenset(names)
        self._add(entries, lambda entries: asked & entries.keys())

    def changed(self) -> bool:
        """Whether anything else is seen now."""
        versions = [*map(_version, self._dicts)]
        if versions == self._versions:
            return False
        if any(look(now) != before for now, (look, before) in zip(self._dicts, self._seen, strict=True)):
            return True
        self._versions = versions
        return False

    def _add(self, entries: dict[Any, Any], look: Callable[[dict[Any, Any]], Any]) -> None:
        if not any(entries is known for known in self._dicts):
            self._dicts.append(entries)
            self._versions.append(_version(entries))
            self._seen.append((look, look(entries)))


def _methods(entries: dict[Any, Any]) -> dict[Any, Any]:
    """Return the names of a class, with its functions, properties and the like."""
    return {name: value if hasattr(value, "__get__") else None for name, value in entries.items()}
