"""Saving and loading the state of the noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from persample.errors import OptionError


def pack_generator(generator: torch.Generator | None) -> dict[str, Any] | None:
    """Return device and state of `generator`."""
    if generator is None:
        return None
    return {"device": str(generator.device), "state": generator.get_state()}


def require_packed_generator(packed: Any) -> None:
    """Raise unless `packed` is what `pack_generator` returns.

    Raises:
        OptionError: it is not.
    """
    if packed is None:
        return
    if not isinstance(packed, Mapping) or not {"device", "state"} <= packed.keys():
        raise OptionError("The saved generator is damaged: it must have a device and a state.")
    require_noise_state(packed["device"], packed["state"])


def require_noise_state(device: Any, state: Any) -> None:
    """Raise unless `state` fits a generator on `device`; without such a device, unless it is a tensor of bytes.

    Raises:
        OptionError: it cannot.
    """
    if not isinstance(state, Tensor) or state.dtype != torch.uint8:
        raise OptionError("The saved state of a generator is damaged: it must be a tensor of bytes.")
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError, ValueError) as error:
        raise OptionError(f"The saved generator is damaged: {device!r} is no device.") from error
    if kind == "cpu":  # others may not be here, and are tried by those who use them
        try:
            torch.Generator().set_state(state.cpu())
        except RuntimeError as error:
            raise OptionError(f"The saved state of a generator is damaged: {error}") from error


def generator_setter(
    packed: Mapping[str, Any] | None, generator: torch.Generator | None
) -> Callable[[], torch.Generator | None]:
    """Return a function that restores `generator`, or a new one if it is None, from what `pack_generator` returned.

    Raises:
        OptionError: they are of different kinds of device, whose states mean different numbers, or there is no such
            device here.
    """
    if packed is None:
        return lambda: generator
    device = torch.device(packed["device"])
    if generator is not None and generator.device.type != device.type:
        raise OptionError(
            f"The saved noise came from a generator on {packed['device']}, this optimizer's is on "
            f"{generator.device}: give it a generator on the same kind of device, or none."
        )
    state = packed["state"].cpu()
    try:
        other = torch.Generator(generator.device if generator is not None else device)
        other.set_state(state)
    except RuntimeError as error:
        raise OptionError(
            f"The saved noise came from a generator on {packed['device']}, which fails here: {error}"
        ) from error

    def set_it() -> torch.Generator:
        if generator is None:
            return other
        generator.set_state(state)
        return generator

    return set_it
