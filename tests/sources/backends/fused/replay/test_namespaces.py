"""What is defined, taken away or redefined is seen, in classes, objects and modules."""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest

from persample.sources.backends.fused.replay.namespaces import Namespaces


class Settings:
    def __getattr__(self, name: str) -> float:
        return 1.0


class Base:
    shared = 1.0

    def method(self) -> int:
        return 1


class Derived(Base):
    pass


@pytest.mark.parametrize("made", [Settings, Base, lambda: types.ModuleType("settings")])
@pytest.mark.parametrize("touched", [False, True])
def test_an_attribute_that_comes_or_goes(made: Callable[[], Any], touched: bool) -> None:
    thing, seen = made(), Namespaces()
    if touched:
        thing.before = 1
    seen.add_object(thing, ["scale"])
    assert not seen.changed()
    thing.other = 1
    assert not seen.changed()
    thing.scale = 2.0
    assert seen.changed()
    del thing.scale
    assert not seen.changed()


def test_another_name_of_the_same_object() -> None:
    thing, seen = Settings(), Namespaces()
    for names in (["scale"], ["scale", "shift"]):
        seen.add_object(thing, names)
    assert not seen.changed()
    thing.shift = 1.0
    assert seen.changed()


class Making(OrderedDict[str, Any]):
    """Makes what is looked up, as tables of activations do."""

    def __getitem__(self, key: str) -> Any:
        return object()


@pytest.mark.parametrize("made", [dict, Settings, Making, lambda: types.ModuleType("settings")])
def test_any_key_or_attribute_that_comes_or_goes(made: Callable[[], Any]) -> None:
    thing, seen = made(), Namespaces()
    seen.add_keys(thing)
    entries = thing if isinstance(thing, dict) else vars(thing)
    assert not seen.changed()
    for key in ("scale", 1):
        entries[key] = 1.0
        assert seen.changed()
        del entries[key]
        assert not seen.changed()


@pytest.mark.parametrize("kind", [OrderedDict, Making])
def test_keys_values_and_order_of_an_ordered_dict(kind: Any) -> None:
    value = [1.0]
    table, seen = kind(a=value, b=2.0), Namespaces()
    seen.add_order(table)
    assert not seen.changed()
    table.move_to_end("a")
    assert seen.changed()
    table.move_to_end("b")
    assert not seen.changed()
    table["a"] = [1.0]
    assert seen.changed()
    table["a"] = value
    assert not seen.changed()
    table["c"] = value
    assert seen.changed()


def test_methods_of_a_class_and_of_its_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Namespaces()
    seen.add_class(Derived)
    monkeypatch.setattr(Base, "shared", 2.0)
    assert not seen.changed(), "values are guarded"
    with monkeypatch.context() as patch:
        patch.setattr(Base, "method", lambda self: 2)
        assert seen.changed()
    assert not seen.changed()
    with monkeypatch.context() as patch:
        patch.setattr(Derived, "method", lambda self: 2, raising=False)
        assert seen.changed()


def test_a_dict_of_keys() -> None:
    entries, seen = {"a": 1}, Namespaces()
    seen.add_names(entries, ["a", "b"])
    entries["a"] = 2
    entries["c"] = 1
    assert not seen.changed()
    del entries["a"]
    assert seen.changed()
