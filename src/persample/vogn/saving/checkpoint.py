"""Saving and loading the optimizers' state beyond PyTorch's own entries, as plain tensors and numbers.

`torch.optim` knows two entries, `state` and `param_groups`. All that is not of a parameter or of a group, the *run*,
stands beside them. Tools that keep those two alone, such as `torch.distributed.checkpoint.state_dict`, find the run
once more in each group, packed into bytes.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from persample.errors import OptionError
from persample.vogn.observations import Observations
from persample.vogn.saving.noise import require_packed_generator
from persample.vogn.saving.observations import checked_observations
from persample.vogn.saving.parameter_matching import Position, positions
from persample.vogn.saving.state_schema import Kinds, is_count, require_state, require_values
from persample.vogn.settings import OF_RUN, OF_WEIGHTS, RUN, refuse_unknown_settings, require_settings, settings_of_run

#: The counts of an optimizer.
COUNTS = ("steps", "skipped_steps", "skipped_in_a_row")


@dataclass(frozen=True)
class Loaded:
    """A saved state, checked and in the order of an optimizer.

    Attributes:
        groups: the settings of each group, without its parameters.
        states: the state of each parameter, on its device; empty if nothing was drawn yet.
        run: the settings and counts of the optimizer.
        observations: what was observed since the last step.
        generator: device and state of the generator, or None.
    """

    groups: list[dict[str, Any]]
    states: dict[Tensor, dict[str, Any]]
    run: dict[str, Any]
    observations: Observations
    generator: Mapping[str, Any] | None


def pack_run(run: Mapping[str, Any]) -> bytes:
    """Return the run as bytes."""
    file = io.BytesIO()
    torch.save(dict(run), file)
    return file.getvalue()


def checked(
    saved: Any,
    groups: Sequence[dict[str, Any]],
    *,
    rule: str,
    kinds: Kinds,
    known: Mapping[str, Any],
    draws_apart: bool,
    products: bool,
) -> Loaded:
    """Check that a saved state belongs to such an optimizer with parameters like those of `groups`, and return it.

    Args:
        saved: what `state_dict()` returned.
        groups: the parameter groups of the optimizer.
        rule: its rule.
        kinds: what the state of a parameter holds.
        known: the settings of a group, with their defaults.
        draws_apart: whether the rule keeps draws apart.
        products: whether it needs products of gradients and noise.

    Raises:
        OptionError: it is not; the message says where they differ, or what is damaged.
    """
    saved_groups, saved_states = _entries(saved, rule)
    run = _run_of(saved, saved_groups, rule)
    if run["rule"] != rule:
        raise OptionError(
            f"This is the state of a {run['rule']}, which a {rule} cannot load: create a {run['rule']}, or load a "
            f"state of {rule}."
        )
    settings = settings_of_run(run)
    counts = {name: _count(name, run[name]) for name in COUNTS}
    if counts["skipped_in_a_row"] > counts["skipped_steps"]:
        raise OptionError("The saved state is damaged: more steps were skipped in a row than were skipped.")
    found = positions(saved_groups, groups)
    loaded_groups = [
        _settings(saved_groups[position.group], group, position, known)
        for group, position in zip(groups, found, strict=True)
    ]
    states = _states(saved_states, groups, found, kinds, counts["steps"])
    own_names = {
        saved_name: (name, param)
        for group, position in zip(groups, found, strict=True)
        for saved_name, name, param in zip(position.names, group["param_names"], group["params"], strict=True)
    }
    require_packed_generator(run["generator"])
    device = None if run["generator"] is None else run["generator"]["device"]
    observations = checked_observations(
        run["observations"], own_names, draws_apart=draws_apart, products=products, generator=device
    )
    return Loaded(loaded_groups, states, settings | counts, observations, run["generator"])


def _entries(saved: Any, rule: str) -> tuple[list[Mapping[str, Any]], Mapping[Any, Any]]:
    if not isinstance(saved, Mapping):
        raise OptionError(f"This is not the state of a {rule}, but of type {type(saved).__name__}.")
    if missing := [key for key in ("state", "param_groups") if key not in saved]:
        raise OptionError(f"This is not the state of a {rule}: {', '.join(missing)} is missing.")
    groups, states = saved["param_groups"], saved["state"]
    if not isinstance(states, Mapping) or not isinstance(groups, list | tuple):
        raise OptionError("The saved state is damaged: state must be a dict, and param_groups a list.")
    if not all(isinstance(group, Mapping) and isinstance(group.get("params"), list | tuple) for group in groups):
        raise OptionError("The saved state is damaged: a parameter group must be a dict with a list of parameters.")
    return list(groups), states


def _run_of(saved: Mapping[str, Any], groups: list[Mapping[str, Any]], rule: str) -> Mapping[str, Any]:
    """Return the run, from beside the groups or inside them."""
    wanted = ("rule", *OF_RUN, *COUNTS, "observations", "generator")
    run: Any = saved
    packed = {group[RUN] for group in groups if isinstance(group.get(RUN), bytes)}
    if packed and not any(key in saved for key in wanted):
        if len(packed) > 1:
            raise OptionError("The saved parameter groups come from several optimizers, or from several times.")
        run = _unpacked(packed.pop())
        if not isinstance(run, Mapping):
            raise OptionError(f"The saved state is damaged: {RUN!r} of its groups holds no dict.")
    if missing := [key for key in wanted if key not in run]:
        raise OptionError(f"This is not the state of a {rule}: {', '.join(missing)} is missing.")
    found: Mapping[str, Any] = run
    return found


def _unpacked(packed: bytes) -> Any:
    damaged = f"The saved state is damaged: {RUN!r} of its groups cannot be read."
    if not packed.startswith(b"PK"):  # as every zip file does, whose checksums find other damages
        raise OptionError(damaged)
    try:
        return torch.load(io.BytesIO(packed), weights_only=True, map_location="cpu")
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, OSError, TypeError, ValueError) as error:
        raise OptionError(damaged) from error


def _count(name: str, value: Any) -> int:
    if not is_count(value):
        raise OptionError(f"The saved {name}={value!r} must be a whole number >= 0: the state is damaged.")
    return int(value)


def _settings(
    saved: Mapping[str, Any], group: Mapping[str, Any], position: Position, known: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings of a group; those by weight are in the order of the optimizer."""
    refuse_unknown_settings({name: value for name, value in saved.items() if name not in group}, known)
    if missing := [name for name in known if name not in saved]:
        raise OptionError(f"The saved state is damaged: a parameter group lacks the setting {missing[0]!r}.")
    settings = {name: value for name, value in saved.items() if name not in ("params", "param_names", RUN)}
    for setting in OF_WEIGHTS:
        if isinstance(settings[setting], list | tuple):
            settings[setting] = _of_weights(setting, settings[setting], group, position)
    require_settings(settings)
    return settings


def _of_weights(setting: str, values: Sequence[Any], group: Mapping[str, Any], position: Position) -> list[Tensor]:
    if len(values) != len(group["params"]):
        raise OptionError(f"The saved {setting} has {len(values)} tensors for {len(group['params'])} parameters.")
    in_order = [values[place] for place in position.of_weights]
    for name, param, value in zip(group["param_names"], group["params"], in_order, strict=True):
        require_values(f"{setting} of {name!r}", value, param)
    return [value.to(param.device) for value, param in zip(in_order, group["params"], strict=True)]


def _states(
    saved: Mapping[Any, Any],
    groups: Sequence[Mapping[str, Any]],
    found: Sequence[Position],
    kinds: Kinds,
    steps: int,
) -> dict[Tensor, dict[str, Any]]:
    ids = {key for position in found for key in position.ids}
    if unknown := [key for key in saved if key not in ids]:
        raise OptionError(f"The saved state is damaged: it has a state of {unknown[0]!r}, which is in no group.")
    if steps == 0 and all(isinstance(state, Mapping) and not state for state in saved.values()):
        return {}  # nothing was drawn yet
    states = {}
    for group, position in zip(groups, found, strict=True):
        for name, param, key in zip(group["param_names"], group["params"], position.ids, strict=True):
            if key not in saved or saved[key] == {}:
                raise OptionError(f"The saved state is damaged: that of {name!r} is missing.")
            require_state(name, param, saved[key], kinds, steps)
            states[param] = {
                entry: value.detach().to(param.device) if isinstance(value, Tensor) else value
                for entry, value in saved[key].items()
            }
    return states
