"""Saving and loading pending observations, checked before they are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from persample.errors import OptionError
from persample.vogn.observations import Observations
from persample.vogn.saving.noise import require_noise_state
from persample.vogn.saving.state_schema import require_values


def checked_observations(
    packed: Any, names: Mapping[str, tuple[str, Tensor]], *, draws_apart: bool, products: bool, generator: Any
) -> Observations:
    """Return the observations, by the optimizer's names and on its devices.

    Args:
        packed: what `Observations.packed` returned.
        names: for each name of a saved parameter, name and parameter of the optimizer.
        draws_apart: whether its rule keeps draws apart.
        products: whether products of gradients and noise take the place of second moments.
        generator: the device of the saved generator, None if there was none.

    Raises:
        OptionError: it is damaged, or belongs to other parameters or another rule.
    """
    if not isinstance(packed, Mapping) or not {"parts", "draws", "without_scaler"} <= packed.keys():
        raise _other_observations("they lack parts, draws or without_scaler")
    parts, draws = packed["parts"], packed["draws"]
    if not isinstance(parts, list | tuple) or not isinstance(draws, list | tuple) or bool(parts) != bool(draws):
        raise _other_observations("parts and draws must be lists, and both empty or none")
    if not isinstance(packed["without_scaler"], bool):
        raise _other_observations("without_scaler must be True or False")
    if len(parts) > 1 and not draws_apart:
        raise _other_observations("this rule keeps one part, whatever the number of draws")
    for draw in draws:
        if not isinstance(draw, Mapping) or not draw:
            raise _other_observations("a draw must be a dict of states of generators")
        for device, state in draw.items():
            # Of a generator that was given to sampled_params() alone, nobody knows the device.
            require_noise_state(device if device != "own" else "meta" if generator is None else generator, state)
    unpacked = [_part(part, names, draws_apart=draws_apart, products=products) for part in parts]
    return Observations.unpacked({**packed, "parts": unpacked})


def _part(part: Any, names: Mapping[str, tuple[str, Tensor]], *, draws_apart: bool, products: bool) -> dict[str, Any]:
    if not isinstance(part, Mapping) or not {"losses", "mean", "second_moment", "noise"} <= part.keys():
        raise _other_observations("a part lacks losses, moments or noise")
    losses = part["losses"]
    if not _is_vector(losses):
        raise _other_observations("losses must be a vector of numbers")

    def of_params(what: str) -> dict[str, Tensor]:
        values = {}
        for saved_name, value in _mapping(part[what]).items():
            if saved_name not in names:
                raise _other_observations(f"this optimizer has no parameter {saved_name!r}")
            name, param = names[saved_name]
            require_values(f"{what} of {name!r}", value, param)
            values[name] = value.detach().to(param.device)
        return values

    mean, second = of_params("mean"), of_params("second_moment")
    noise = None if part["noise"] is None else of_params("noise")
    below = not products and any(bool((v < 0).any()) for v in second.values())
    if not mean or (second and second.keys() != mean.keys()) or below:
        raise _other_observations("mean and second moment do not belong together")
    if draws_apart == bool(second) or draws_apart != (noise is not None):
        raise _other_observations("they are those of another rule")
    if noise is not None and not (
        mean.keys() <= noise.keys() and all(bool(e.isfinite().all()) for e in noise.values())
    ):
        raise _other_observations("the noise must be finite, and there for each parameter")
    beside_them = losses.to(next(iter(mean.values())).device)
    return {"losses": beside_them, "mean": mean, "second_moment": second, "noise": noise}


def _is_vector(values: Any) -> bool:
    ordinary = isinstance(values, Tensor) and values.layout is torch.strided and not values.is_meta
    return ordinary and values.dim() == 1 and len(values) > 0 and values.is_floating_point()


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _other_observations("moments and noise must be dicts")
    return value


def _other_observations(reason: str) -> OptionError:
    return OptionError(
        f"The saved moments, which wait for the next step, are damaged or belong to another optimizer ({reason}): call "
        "step() before saving."
    )
