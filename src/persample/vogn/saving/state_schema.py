"""A schema of a parameter's state, to check a saved one before it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from persample.errors import OptionError
from persample.sources.model.refusals import is_sharded


@dataclass(frozen=True)
class Kept:
    """One entry of the state of a parameter.

    Attributes:
        allowed: what it may be, in words.
        holds: whether a value is that; of a tensor, its entries.
        is_tensor: whether it has a number for each weight, else it is one number.
        optional: whether it may be missing.
    """

    allowed: str
    holds: Callable[[Any], Any]
    is_tensor: bool = True
    optional: bool = False


Kinds: TypeAlias = Mapping[str, Kept]

FINITE = Kept("finite numbers", lambda values: values.isfinite())
NOT_NEGATIVE = Kept("finite numbers >= 0", lambda values: values.isfinite() & (values >= 0))
MASS = Kept("a number from 0 to 1", lambda value: isinstance(value, float | int) and 0 <= value <= 1, is_tensor=False)


def require_state(name: str, param: Tensor, state: Any, kinds: Kinds, steps: int) -> None:
    """Check that `state` is one of a parameter.

    Args:
        name: of the parameter.
        param: the parameter.
        state: what was saved.
        kinds: what it must have beside the number of its steps.
        steps: of the optimizer, which is at least that of the parameter.

    Raises:
        OptionError: it is not; the message names the entry.
    """
    if not isinstance(state, Mapping):
        raise OptionError(f"The saved state of {name!r} is damaged: it is of type {type(state).__name__}.")
    entries = {"step": Kept(f"a whole number from 0 to {steps}", lambda v: is_count(v) and v <= steps, False), **kinds}
    if unknown := [key for key in state if key not in entries]:
        raise OptionError(f"The saved state of {name!r} has the entry {unknown[0]!r}, which is not one of this rule.")
    for key, kept in entries.items():
        if key in state:
            _require_entry(f"{key} of {name!r}", param, state[key], kept)
        elif not kept.optional:
            raise OptionError(f"The saved state of {name!r} is damaged: {key!r} is missing.")
    optional = [key for key, kept in entries.items() if kept.optional]
    if len({key in state for key in optional}) > 1:
        raise OptionError(f"The saved state of {name!r} is damaged: it lacks one of {' and '.join(optional)}.")


def _require_entry(what: str, param: Tensor, value: Any, kept: Kept) -> None:
    if kept.is_tensor:
        require_values(what, value, param)
    if not (bool(torch.as_tensor(kept.holds(value)).all())):
        shown = "" if kept.is_tensor else f", not {value!r}"
        raise OptionError(f"The saved {what} must be {kept.allowed}{shown}: the state is damaged.")


def require_values(what: str, value: Any, param: Tensor) -> None:
    """Check that `value` is a tensor with a number for each weight of `param`, not rounded to less than float32.

    Raises:
        OptionError: it is not.
    """
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta or is_sharded(value):
        kind = f"{value.layout} tensor on {value.device}" if isinstance(value, Tensor) else type(value).__name__
        raise OptionError(f"The saved {what} must be an ordinary tensor, not a {kind}: the state is damaged.")
    if value.shape != param.shape:
        raise OptionError(
            f"The saved state has shape {tuple(value.shape)} for {what}, which has {tuple(param.shape)} here: it "
            "belongs to another model."
        )
    if not value.is_floating_point() or torch.promote_types(value.dtype, torch.float32) != value.dtype:
        raise OptionError(
            f"The saved {what} is of {value.dtype}, but it is kept in at least float32: it was cast after saving, and "
            "the lost precision cannot be recovered. Load what state_dict() returned."
        )


def is_count(value: Any) -> bool:
    """Whether `value` is a whole number >= 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
