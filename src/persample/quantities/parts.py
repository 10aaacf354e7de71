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


def group_of_each(per: Per, parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the group of each parameter that is in one.

    Raises:
        OptionError: `per` is something else, names no parameter, or puts one into two groups.
    """
    if per is None:
        return dict.fromkeys(parameters, ALL)
    if per == "parameter":
        return {name: name for name in parameters}
    if not isinstance(per, Mapping):
        raise OptionError(f"per={per!r} is not known: pass None, 'parameter', or a dict of names by group.")
    found: dict[str, str] = {}
    for group, beginnings in per.items():
        for beginning in [beginnings] if isinstance(beginnings, str) else beginnings:
            names = [name for name in parameters if name == beginning or name.startswith(f"{beginning}.")]
            if not names:
                raise OptionError(
                    f"Group {group!r} names {beginning!r}, which is no parameter that requires a gradient, nor the "
                    f"beginning of one: use names of model.named_parameters(), such as {next(iter(parameters), '')!r}."
                )
            for name in names:
                if found.setdefault(name, group) != group:
                    raise OptionError(f"Parameter {name!r} is in the groups {found[name]!r} and {group!r}: name one.")
    return found


class ByGroup:
    """Tensors that are added up over the parameters of each group."""

    def __init__(self, per: Per, setting: Setting, *shape: int) -> None:
        self.groups = group_of_each(per, setting.parameters)
        names = [ALL] if per is None else list(dict.fromkeys(self.groups.values()))
        self.values = {group: setting.zeros(*shape) for group in names}
        self._together = per is None

    def of(self, name: str) -> Tensor | None:
        """Return the tensor to which the parameter adds; None if it is in no group."""
        return self.values[self.groups[name]] if name in self.groups else None

    def result(self) -> Tensor | dict[str, Tensor]:
        """Return the one tensor, or those by group."""
        return self.values[ALL] if self._together else self.values
