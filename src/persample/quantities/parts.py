"""Groups of parameters, for which a quantity is told apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from torch import Tensor

from persample.errors import OptionError
from persample.quantities.protocol import Setting

#: None for all parameters together, `"parameter"` for each alone, or names (or their beginnings, up to a dot) by group.
Per = Literal["parameter"] | Mapping[str, Iterable[str]] | None

ALL = "all parameters"


def members(per: Per, parameters: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of the parameters in each group.

    Raises:
        OptionError: `per` is something else, or names no parameter.
    """
    parameters = list(parameters)
    if per is None:
        return {ALL: parameters}
    if per == "parameter":
        return {name: [name] for name in parameters}
    if not isinstance(per, Mapping):
        raise OptionError(f"per={per!r} is not known: pass None, 'parameter', or a dict of names by group.")
    return {group: _named(group, beginnings, parameters) for group, beginnings in per.items()}


def _named(group: str, beginnings: Iterable[str], parameters: list[str]) -> list[str]:
    if not isinstance(beginnings, Iterable):
        raise OptionError(f"Group {group!r} of per= is {beginnings!r}: pass names of parameters or modules.")
    beginnings = [beginnings] if isinstance(beginnings, str) else list(beginnings)
    for beginning in beginnings:
        if not any(_begins(name, beginning) for name in parameters):
            raise OptionError(
                f"Group {group!r} names {beginning!r}, which is no parameter that requires a gradient, nor the "
                f"beginning of one: use names of model.named_parameters(), such as {next(iter(parameters), '')!r}."
            )
    return [name for name in parameters if any(_begins(name, beginning) for beginning in beginnings)]


def _begins(name: str, beginning: str) -> bool:
    return name == beginning or name.startswith(f"{beginning}.")


def group_of_each(names_by_group: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Return the group of each parameter that is in one.

    Raises:
        OptionError: a parameter is in two groups.
    """
    found: dict[str, str] = {}
    for group, names in names_by_group.items():
        for name in names:
            if name in found:
                raise OptionError(f"Parameter {name!r} is in the groups {found[name]!r} and {group!r}: name one.")
            found[name] = group
    return found


class ByGroup:
    """Tensors that are added up over the parameters of each group."""

    def __init__(self, per: Per, setting: Setting, *shape: int) -> None:
        names = members(per, setting.parameters)
        self.groups = group_of_each(names)
        self.values = {group: setting.zeros(*shape) for group in names}
        self._together = per is None

    def of(self, name: str) -> Tensor | None:
        """Return the tensor to which the parameter adds; None if it is in no group."""
        return self.values[self.groups[name]] if name in self.groups else None

    def result(self) -> Tensor | dict[str, Tensor]:
        """Return the one tensor, or those by group."""
        return self.values[ALL] if self._together else self.values
