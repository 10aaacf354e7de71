"""What VOGN saves beside PyTorch's own entries, as plain tensors and numbers, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from persample.errors import OptionError
from persample.moments import Moments
from persample.vogn.checks import check_settings

KEYS = (
    "state",
    "param_groups",
    "data_size",
    "mc_samples",
    "skipped_steps",
    "skipped_in_a_row",
    "observed",
    "generator",
)


def check_matches(saved: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
    """Check that `saved` is the state of a VOGN with parameters like those of `groups`, position by position.

    Raises:
        OptionError: it is not; the message says where they differ.
    """
    missing = [key for key in KEYS if key not in saved]
    if missing:
        raise OptionError(f"This is not the state of a VOGN: {', '.join(missing)} is missing.")
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
            state = saved["state"].get(index)
            if state and state["curvature"].shape != param.shape:
                raise OptionError(
                    f"The saved state has shape {tuple(state['curvature'].shape)} where this optimizer has {name} of "
                    f"shape {tuple(param.shape)}: it belongs to another model."
                )
    if saved["observed"]:
        for moment in (saved["observed"]["mean"], saved["observed"]["second_moment"]):
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


def pack_moments(moments: Moments | None) -> dict[str, Any] | None:
    """Return `moments` as a dict of tensors and dicts of tensors."""
    if moments is None:
        return None
    return {
        "losses": moments.losses,
        "mean": dict(moments.mean),
        "second_moment": dict(moments.second_moment),
    }


def unpack_moments(packed: Mapping[str, Any] | None, params: Mapping[str, Tensor]) -> Moments | None:
    """Undo `pack_moments`, on the devices of the parameters `params`."""
    if packed is None:
        return None
    return Moments(
        losses=packed["losses"].to(next(iter(params.values())).device),
        mean={name: value.to(params[name].device) for name, value in packed["mean"].items()},
        second_moment={name: value.to(params[name].device) for name, value in packed["second_moment"].items()},
    )


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
            f"{generator.device}: give VOGN a generator on the same kind of device, or none."
        )
    generator.set_state(packed["state"].cpu())
    return generator
