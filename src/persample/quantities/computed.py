"""The quantities of one batch, by the objects that asked for them or by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from persample.errors import OptionError
from persample.quantities.protocol import Quantity, Result

FIELDS = ("losses", "asked", "results", "groups")


@dataclass(frozen=True)
class Quantities:
    """What `source.compute` returns: `several[quantity]`, typed, or `several.norms` by the quantity's name.

    Attributes:
        losses: the B losses, detached, shape `(B,)`.
        asked: the quantities, in the order in which they were given.
        results: what was found for each.
        groups: with `groups=`, the number of each group, ascending, in the order of the results; otherwise None.
    """

    losses: Tensor
    asked: Sequence[Quantity[Any]]
    results: Sequence[Any]
    groups: Tensor | None = None

    def __getitem__(self, quantity: Quantity[Result]) -> Result:
        for asked, result in zip(self.asked, self.results, strict=True):
            if asked is quantity:
                found: Result = result
                return found
        raise OptionError(f"{quantity!r} is none of the quantities that were computed: {self._names()}.")

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and name not in FIELDS:
            for asked, result in zip(self.asked, self.results, strict=True):
                if asked.name == name:
                    return result
        raise AttributeError(f"no quantity {name!r} was computed")

    def _names(self) -> str:
        return ", ".join(asked.name for asked in self.asked)


def refuse_quantities(quantities: Sequence[Any]) -> None:
    """Raise `OptionError` unless these are quantities whose names differ."""
    names = set()
    for quantity in quantities:
        if (
            isinstance(quantity, type)
            or not hasattr(quantity, "begin")
            or not isinstance(getattr(quantity, "name", None), str)
        ):
            raise OptionError(
                f"{quantity!r} is no quantity: pass an object with a name and a method begin(setting), such as "
                "persample.quantities.Norms()."
            )
        if quantity.name in names or quantity.name in FIELDS:
            raise OptionError(
                f"Two results would be called {quantity.name!r}: give one another name, as "
                f"{type(quantity).__name__}(…, name='…') does."
            )
        names.add(quantity.name)


def numbers_in(result: Any, where: str = "", key: str = "") -> Iterator[tuple[str, str, Tensor]]:
    """Yield the numbers of a result, each with where it stands and with the last key of a mapping on the way to it."""
    if isinstance(result, Tensor):
        yield where, key, result.detach()
    elif isinstance(result, bool | int | float):
        yield where, key, torch.tensor(float(result), dtype=torch.float64)
    elif isinstance(result, Mapping):
        for name, value in result.items():
            yield from numbers_in(value, f"{where} of {name!r}", str(name))
    elif isinstance(result, tuple | list):
        for number, value in enumerate(result):
            yield from numbers_in(value, f"{where}[{number}]", key)
    elif is_dataclass(result):
        for each in fields(result):
            yield from numbers_in(getattr(result, each.name), f"{where}.{each.name}", key)
