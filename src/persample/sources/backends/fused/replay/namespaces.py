"""What classes, objects and Python's modules define, so that a change is seen: another method, a name that is new."""

from __future__ import annotations

import gc
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch

_version = torch._C._dynamo.guards.dict_version  # changes with every change of a dict


# From Python 3.13 on, an object may get an attribute without a change of its dict's version.
_VERSIONS_TELL_ATTRIBUTES = sys.version_info < (3, 13)

Look = Callable[[dict[Any, Any]], Any]


class Namespaces:
    """Classes, objects and modules, and what is seen of each, as it is when it is added."""

    def __init__(self) -> None:
        self._dicts: list[dict[Any, Any]] = []
        self._versions: list[int] = []
        self._seen: list[tuple[Look, Any]] = []
        self._without_version: list[tuple[dict[Any, Any], Look, Any]] = []
        self._known: set[tuple[int, Look | frozenset[Any]]] = set()

    def add_class(self, kind: type) -> None:
        """Add a class and its bases: the names that it defines, and its methods, but not other values."""
        for base in kind.__mro__:
            (entries,) = gc.get_referents(vars(base))  # behind the read-only view
            self._add(entries, frozenset(), _methods, by_version=True)

    def add_object(self, value: Any, names: Iterable[Any]) -> None:
        """Add an object or a module: which of these names it defines."""
        if hasattr(value, "__dict__"):
            self.add_names(vars(value), names, by_version=_VERSIONS_TELL_ATTRIBUTES or isinstance(value, ModuleType))

    def add_names(self, entries: dict[Any, Any], names: Iterable[Any], *, by_version: bool = True) -> None:
        """Add a dict: which of these keys it has."""
        asked = frozenset(names)
        self._add(entries, asked, lambda entries: asked & entries.keys(), by_version)

    def add_keys(self, value: Any) -> None:
        """Add an object, and a dict: which attributes it has, and which keys."""
        if isinstance(value, dict):
            self._add(value, frozenset(), _keys, by_version=True)
        if isinstance(attributes := getattr(value, "__dict__", None), dict):
            tell = _VERSIONS_TELL_ATTRIBUTES or isinstance(value, ModuleType)
            self._add(attributes, frozenset(), _keys, by_version=tell)

    def add_order(self, entries: OrderedDict[Any, Any]) -> None:
        """Add an `OrderedDict`: its keys and values, in their order, of which the version of a dict says nothing."""
        self._add(entries, frozenset(), _in_order, by_version=False)

    def changed(self) -> bool:
        """Whether anything else is seen now."""
        if any(look(entries) != before for entries, look, before in self._without_version):
            return True
        versions = [*map(_version, self._dicts)]
        if versions == self._versions:
            return False
        rows = zip(versions, self._versions, self._dicts, self._seen, strict=True)
        if any(now != before and look(entries) != seen for now, before, entries, (look, seen) in rows):
            return True
        self._versions = versions
        return False

    def _add(self, entries: dict[Any, Any], asked: frozenset[Any], look: Look, by_version: bool) -> None:
        known = id(entries), asked or look
        if known in self._known:
            return
        self._known.add(known)
        if by_version:
            self._dicts.append(entries)
            self._versions.append(_version(entries))
            self._seen.append((look, look(entries)))
        else:
            self._without_version.append((entries, look, look(entries)))


def _methods(entries: dict[Any, Any]) -> dict[Any, Any]:
    """Return the names of a class, with its functions, properties and the like."""
    return {name: value if hasattr(value, "__get__") else None for name, value in entries.items()}


def _keys(entries: dict[Any, Any]) -> frozenset[Any]:
    return frozenset(dict.keys(entries))


def _in_order(entries: Any) -> list[_Same]:
    """Return keys and values of an `OrderedDict`; a subclass may show others."""
    items: list[Any] = [*OrderedDict.keys(entries), *OrderedDict.values(entries)]
    return [*map(_Same, items)]


class _Same:
    """Something that equals itself alone."""

    __slots__ = ("_value",)

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value

    __hash__ = None  # type: ignore[assignment]
