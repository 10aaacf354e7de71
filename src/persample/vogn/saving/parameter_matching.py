"""Matching saved parameters to those of an optimizer: by name if all names agree, otherwise by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from persample.errors import OptionError

Groups = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Position:
    """The positions of a group's parameters in a saved state.

    Attributes:
        group: the number of the saved group.
        ids: under what each parameter was saved, in the order of the optimizer's group.
        names: what each was called then.
        of_weights: the place of each in the lists of settings that have a tensor for each parameter.
    """

    group: int
    ids: list[Any]
    names: list[str]
    of_weights: list[int]


def positions(saved: Groups, own: Groups) -> list[Position]:
    """Return the positions in `saved` of the parameters of each group of `own`.

    Names are compared without what `torch.compile` and wrappers put before them.

    Raises:
        OptionError: there are other groups, or parameters whose names say that they are in other places.
    """
    ids = [list(group["params"]) for group in saved]
    _require_ids(list(chain.from_iterable(ids)))
    listed = [_listed(group) for group in saved]
    sizes, own_sizes = [len(keys) for keys in ids], [len(group["params"]) for group in own]
    if sorted(sizes) != sorted(own_sizes):
        raise OptionError(
            f"The saved state has parameter groups of {sizes} parameters, this optimizer of {own_sizes}: build it with "
            "the same groups."
        )
    if sizes != [len(names) for names in listed]:
        raise OptionError("The saved state is damaged: a group has different numbers of names and parameters.")
    # Tools that save parameters under their names bring those into the order of the optimizer, but not other lists.
    names = [keys if _are_names(keys) else there for keys, there in zip(ids, listed, strict=True)]
    own_names = [group["param_names"] for group in own]
    bare, own_bare, listed_bare = (_bare(lists) for lists in (names, own_names, listed))
    if _same(bare, own_bare):
        found = [_by_names(group, bare) for group in own_bare]
    else:
        _require_other_names(bare, own_bare)
        found = [(number, list(range(size))) for number, size in enumerate(sizes)]
    return [
        _position(number, order, ids[number], bare[number], listed[number], listed_bare[number])
        for number, order in found
    ]


def _position(
    number: int, order: list[int], ids: list[Any], bare: list[str], listed: list[str], listed_bare: list[str]
) -> Position:
    """Return where the parameters of a group are in the saved group `number`, in the `order` of the optimizer."""
    in_lists = [listed_bare.index(bare[i]) if bare[i] in listed_bare else i for i in order]
    return Position(number, [ids[i] for i in order], [listed[i] for i in in_lists], in_lists)


def _by_names(group: list[str], saved: list[list[str]]) -> tuple[int, list[int]]:
    """The number of the saved group with the same names, and where they are in it."""
    for number, names in enumerate(saved):
        if set(names) == set(group):
            return number, [names.index(name) for name in group]
    raise OptionError(
        f"No parameter group of the saved state has {group[0]!r} together with the others of its group: build the "
        "optimizer with the same parameter groups."
    )


def _require_other_names(saved: list[list[str]], own: list[list[str]]) -> None:
    """Raise if a common name is at another position, so that matching by position would be wrong."""
    if [len(names) for names in saved] != [len(names) for names in own]:
        raise OptionError("The saved state has its parameter groups in another order: build them in the same order.")
    there, here = list(chain.from_iterable(saved)), list(chain.from_iterable(own))
    for name, own_name in zip(there, here, strict=True):
        if name != own_name and (name in here or own_name in there):
            raise OptionError(
                f"The saved state has {name!r} where this optimizer has {own_name!r}, and other parameters, so they "
                "cannot be matched. Build the optimizer with the same parameters, in the same order."
            )


def _require_ids(ids: list[Any]) -> None:
    in_order = all(type(key) is int for key in ids) and ids == list(range(len(ids)))
    if not in_order and not (_are_names(ids) and len(set(ids)) == len(ids)):
        raise OptionError(
            "The saved state is damaged: the parameters of its groups must be numbered in their order, or have names."
        )


def _are_names(ids: list[Any]) -> bool:
    return bool(ids) and all(isinstance(key, str) for key in ids)


def _listed(group: Mapping[str, Any]) -> list[str]:
    names = group.get("param_names", ())
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise OptionError("The saved state is damaged: the names of the parameters must be strings.")
    return list(names)


def _same(saved: list[list[str]], own: list[list[str]]) -> bool:
    """Whether both have the same names, each once."""
    there, here = list(chain.from_iterable(saved)), list(chain.from_iterable(own))
    return sorted(there) == sorted(here) and len(set(there)) == len(there)


def _bare(names: list[list[str]]) -> list[list[str]]:
    """The names without what `torch.compile` and wrappers put into them, unless two would be the same then."""
    bare = [[".".join(p for p in name.split(".") if p not in ("_orig_mod", "module")) for name in g] for g in names]
    flat = list(chain.from_iterable(bare))
    return bare if len(set(flat)) == len(flat) else names
