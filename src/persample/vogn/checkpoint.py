"""What the optimizers save beside PyTorch's own entries, as plain tensors and numbers, and the way back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from persample.errors import OptionError
from persample.vogn.settings import check_settings

_KEYS = ("state", "param_groups", "rule", "observations", "generator")


def check_matches(saved: Mapping[str, Any], rule: str, names: Iterable[str], groups: list[dict[str, Any]]) -> None:
    """Check that `saved` is the state of such an optimizer with parameters like those of `groups`, one by one.

    Args:
        saved: what `state_dict()` returned.
        rule: the rule of this optimizer.
        names: what it saves beside `_KEYS`.
        groups: its parameter groups.

    Raises:
        OptionError: it is not; the message says where they differ.
    """
    if missing := [key for key in (*_KEYS, *names) if key not in saved]:
        raise OptionError(f"This is not the state of a {rule}: {', '.join(missing)} is missing.")
    if saved["rule"] != rule:
        raise OptionError(f"This is the state of a {saved['rule']}, which means other things than that of a {rule}.")
    saved_sizes = [len(group["params"]) for group in saved["param_groups"]]
    own_sizes = [len(group["params"]) for group in groups]
    if saved_sizes != own_sizes:
        raise OptionError(
            f"The saved state has parameter groups of {saved_sizes} parameters, this optimizer of {own_sizes}: build "
            "it with the same groups."
        )
    shapes = {}
    for saved_group, group in zip(saved["param_groups"], groups, strict=True):
        check_settings(saved_group)
        for index, name, param in zip(saved_group["params"], group["param_names"], group["params"], strict=True):
            shapes[name] = param.shape
            for value in saved["state"].get(index, {}).values():
                if isinstance(value, Tensor) and value.shape != param.shape:
                    raise OptionError(
                        f"The saved state has shape {tuple(value.shape)} where this optimizer has {name} of "
                        f"shape {tuple(param.shape)}: it belongs to another model."
                    )
    for part in saved["observations"]["parts"]:
        for moment in (part["mean"], part["second_moment"]):
            if any(shapes.get(name) != value.shape for name, value in moment.items()):
                raise OptionError("The saved moments belong to other parameters: call step() before saving.")


def unpack_states(saved: Mapping[str, Any], groups: list[dict[str, Any]]) -> dict[Tensor, dict[str, Any]]:
    """Return the saved state of each parameter of `groups`, on its device and in the dtypes that were saved."""
    return {
        param: {
            key: value.to(param.device) if isinstance(value, Tensor) else value
            for key, value in saved["state"].get(index, {}).items()
        }
        for saved_group, group in zip(saved["param_groups"], groups, strict=True)
        for index, param in zip(saved_group["params"], group["params"], strict=True)
    }


def pack_generator(generator: torch.Generator | None) -> dict[str, Any] | None:
    """Return device and state of `generator`."""
    if generator is None:
        return None
    return {"device": str(generator.device), "state": generator.get_state()}


def unpack_generator(packed: Mapping[str, Any] | None, generator: torch.Generator | None) -> torch.Generator | None:
    """Set `generator`, or a new one if it is None, to the state that `pack_generator` returned.

    Raises:
        OptionError: they are of different kinds of device, whose states mean different numbers.
    """
    if packed is None:
        return generator
    if generator is None:
        generator = torch.Generator(packed["device"])
    elif generator.device.type != torch.device(packed["device"]).type:
        raise OptionError(
            f"The saved noise came from a generator on {packed['device']}, this optimizer's is on "
            f"{generator.device}: give it a generator on the same kind of device, or none."
        )
    generator.set_state(packed["state"].cpu())
    return generator
