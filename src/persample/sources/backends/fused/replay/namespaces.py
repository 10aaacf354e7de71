"""What classes, objects and Python's modules define, so that a change is seen: another method, a name that is new."""

from __future__ import annotations

import gc
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from operator import is_
from types import ModuleType
from typing import Any

import torch

_version = torch._C._dynamo.guards.dict_version  # changes with every change of a dict

Look = Callable[[dict[Any, Any]], Any]


class Namespaces:
    """Classes, objects and modules, and what is seen of each, as it is when it is added."""

    def __init__(self) -> None:
        self._dicts: list[dict[Any, Any]] = []
        self._versions: list[int] = []
        self._seen: list[tuple[Look, Any]] = []
        self._without_version: list[tuple[dict[Any, Any], Look, Any]] = []
        self._ordered: list[tuple[OrderedDict[Any, Any], list[Any]]] = []
        self._known: set[tuple[int, Look | frozenset[Any]]] = set()

    def add_class(self, kind: type) -> None:
        """Add a class and its bases: the names that it defines, and its methods, but not other values."""
        for base in kind.__mro__:
            (entries,) = gc.get_referents(vars(base))  # behind the read-only view
            self._add(entries, _methods)

    def add_object(self, value: Any, names: Iterable[Any]) -> None:
        """Add an object or a module: which of these names it defines."""
        if hasattr(value, "__dict__"):
            self.add_names(vars(value), names, by_version=_version_tells_attributes(value))

    def add_names(self, entries: dict[Any, Any], names: Iterable[Any], *, by_version: bool = True) -> None:
        """Add a dict: which of these keys it has."""
        asked = frozenset(names)
        self._add(entries, lambda entries: asked & entries.keys(), by_version=by_version, what=asked)

    def add_keys(self, value: Any) -> None:
        """Add an object, and a dict: which attributes it has, and which keys."""
        if isinstance(value, dict):
            self._add(value, _keys)
        if isinstance(attributes := getattr(value, "__dict__", None), dict):
            self._add(attributes, _keys, by_version=_version_tells_attributes(value))

    def add_order(self, entries: OrderedDict[Any, Any]) -> None:
        """Add an `OrderedDict`: its keys and values, in their order, of which the version of a dict says nothing."""
        if all(entries is not other for other, _ in self._ordered):
            self._ordered.append((entries, _in_order(entries)))

    def changed(self) -> bool:
        """Whether anything else is seen now."""
        if any(look(entries) != before for entries, look, before in self._without_version):
            return True
        if not all(_are(_in_order(entries), before) for entries, before in self._ordered):
            return True
        versions = [*map(_version, self._dicts)]
        if versions == self._versions:
            return False
        rows = zip(versions, self._versions, self._dicts, self._seen, strict=True)
        if any(now != before and look(entries) != seen for now, before, entries, (look, seen) in rows):
            return True
        self._versions = versions
        return False

    def _add(
        self, entries: dict[Any, Any], look: Look, *, by_version: bool = True, what: frozenset[Any] | None = None
    ) -> None:
        """Add a dict, once for each look, or for what that asks for."""
        known = id(entries), look if what is None else what
        if known in self._known:
            return
        self._known.add(known)
        if by_version:
            self._dicts.append(entries)
            self._versions.append(_version(entries))
            self._seen.append((look, look(entries)))
        else:
            self._without_version.append((entries, look, look(entries)))


def _version_tells_attributes(value: object) -> bool:
    """Whether the version of its dict changes when an object gets an attribute: not so from Python 3.13 on."""
    return sys.version_info < (3, 13) or isinstance(value, ModuleType)


def _methods(entries: dict[Any, Any]) -> dict[Any, Any]:
    """Return the names of a class, with its functions, properties and the like."""
    return {name: value if hasattr(value, "__get__") else None for name, value in entries.items()}


def _keys(entries: dict[Any, Any]) -> frozenset[Any]:
    return frozenset(dict.keys(entries))


def _in_order(entries: OrderedDict[Any, Any]) -> list[Any]:
    """Return keys and values of an `OrderedDict`; a subclass may show others."""
    return [*OrderedDict.keys(entries), *OrderedDict.values(entries)]


def _are(found: list[Any], before: list[Any]) -> bool:
    """Whether these are the same objects."""
    return len(found) == len(before) and all(map(is_, found, before))
