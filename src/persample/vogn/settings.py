"""The settings of parameter groups: allowed values, parameters, priors."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from numbers import Integral, Real
from typing import Any, Required, TypedDict, get_args

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from persample.errors import OptionError
from persample.sources.recording.results import LossReduction
from persample.vogn.prior import Prior


class SharedSettings(TypedDict, total=False):
    """The settings common to all rules; `VOGN` documents each."""

    data_size: Required[int]
    prior_precision: float | Mapping[str, Tensor]
    prior_mean: float | Mapping[str, Tensor]
    prior: Prior | None
    temperature: float
    temperature_start: float
    temperature_steps: int
    max_grad_norm: float | None
    augmentation: float
    mc_samples: int
    loss_reduction: LossReduction
    generator: torch.Generator | None
    params: Iterable[Any] | None
    process_group: ProcessGroup | None


def _is_number(value: object) -> bool:
    """Whether `value` is a finite number that PyTorch can compute with."""
    if type(value) is float:  # as most are, in every step: the general question costs ten times as much
        return math.isfinite(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    return abs(int(value)) < 2**63 if isinstance(value, Integral) else math.isfinite(value)


def _number(holds: Callable[[float], bool]) -> Callable[[Any], bool]:
    return lambda value: _is_number(value) and holds(float(value))


def _numbers(holds: Callable[[float | Tensor], Any]) -> Callable[[Any], bool]:
    """Whether a condition holds for a number, or for all entries of a list of tensors."""

    def check(value: Any) -> bool:
        if isinstance(value, list):
            return all(isinstance(t, Tensor) and bool((t.isfinite() & holds(t)).all()) for t in value)
        return _is_number(value) and bool(holds(float(value)))

    return check


# Of each setting what it may be, in words and as a condition. A rule has some of them.
_ALLOWED: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "lr": ("a finite number >= 0", _number(lambda v: v >= 0)),
    "prior_precision": (
        "a finite number >= 0, or a tensor of such numbers for each parameter",
        _numbers(lambda v: v >= 0),
    ),
    "prior_mean": ("a finite number, or a tensor of such numbers for each parameter", _numbers(lambda v: v == v)),
    "decay": ("a number from 0 to 1", _number(lambda v: 0 <= v <= 1)),
    "hess_init": ("a finite number >= 0", _number(lambda v: v >= 0)),
    "momentum": ("a number >= 0 and < 1", _number(lambda v: 0 <= v < 1)),
    "bias_correction": ("True or False", lambda v: isinstance(v, bool)),
    "average_prior": ("True or False", lambda v: isinstance(v, bool)),
    "order": ('"printed" or "updated"', lambda v: v in ("printed", "updated")),
    "damping": ("a finite number >= 0", _number(lambda v: v >= 0)),
    "temperature": ("a finite number > 0", _number(lambda v: v > 0)),
    "temperature_start": ("a finite number > 0", _number(lambda v: v > 0)),
    "temperature_steps": ("a whole number >= 0", lambda v: _is_number(v) and isinstance(v, Integral) and int(v) >= 0),
    "max_update": ("a finite number > 0, or None", lambda v: v is None or _number(lambda w: w > 0)(v)),
    "betas": (
        "two numbers >= 0 and < 1",
        lambda v: isinstance(v, tuple | list) and len(v) == 2 and all(_number(lambda b: 0 <= b < 1)(b) for b in v),
    ),
    "rescale_lr": ("True or False", lambda v: isinstance(v, bool)),
    "eps": ("a finite number >= 0", _number(lambda v: v >= 0)),
    "scale_init": ("a finite number > 0", _number(lambda v: v > 0)),
}


#: Settings that may have a tensor for each parameter of a group.
OF_WEIGHTS = ("prior_precision", "prior_mean")

#: The entry of groups for what is of the whole optimizer, see `persample.vogn.saving.checkpoint`.
RUN = "run"

# What PyTorch and its schedulers put into groups beside settings, and the name that loggers show.
_OF_ANY_OPTIMIZER = {
    RUN,
    "params",
    "param_names",
    "name",
    "initial_lr",
    "max_lr",
    "min_lr",
    "base_momentum",
    "max_momentum",
    "swa_lr",
}


def refuse_unknown_settings(group: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise if a parameter group has unknown settings.

    Args:
        group: the group.
        known: the settings of the rule, and what else may be there.

    Raises:
        OptionError: it has; the message names one, and those that there are.
    """
    for name in group:
        if name in known or name in _OF_ANY_OPTIMIZER:
            continue
        if name in OF_RUN:
            reason = "applies to the whole optimizer: pass it beside params, not in a group"
        elif name == "weight_decay":
            reason = "is not known: a weight decay of w is prior_precision = w * data_size"
        else:
            reason = f"is not known: there are {', '.join(sorted(known))}"
        raise OptionError(f"A parameter group has the setting {name!r}, which {reason}.")


def require_settings(settings: Mapping[str, Any]) -> None:
    """Check the known settings of a parameter group.

    Raises:
        OptionError: a value is out of its range, or the first posterior would have precision 0.
    """
    for name, (allowed, holds) in _ALLOWED.items():
        if name in settings and not holds(settings[name]):
            value = "{…}" if isinstance(settings[name], list) else repr(settings[name])
            raise OptionError(f"{name}={value} must be {allowed}.")
    if settings.get("hess_init") == 0 and settings["prior_precision"] == 0 and not settings.get("damping"):
        raise OptionError(
            "hess_init=0 and prior_precision=0 together give the first posterior the precision N s + λ = 0, from "
            "which no weight can be drawn: make one of them positive."
        )


def require_count(name: str, value: object) -> int:
    """Return `value` if it is a whole number >= 1.

    Raises:
        OptionError: it is not.
    """
    if not _is_number(value) or not isinstance(value, Integral) or value < 1:
        raise OptionError(f"{name}={value!r} must be a whole number >= 1.")
    return int(value)


def require_positive_number(name: str, value: object) -> float:
    """Return `value` if it is a number above 0.

    Raises:
        OptionError: it is not.
    """
    if not _number(lambda v: v > 0)(value):
        raise OptionError(f"{name}={value!r} must be a finite number > 0.")
    return float(value)  # type: ignore[arg-type]


def _require_reduction(name: str, value: object) -> object:
    if not isinstance(value, str) or value not in get_args(LossReduction):
        raise OptionError(f'{name}={value!r} must be "mean" or "sum".')
    return value


#: The settings that are not of groups, with their checks.
OF_RUN: Mapping[str, Callable[[str, object], object]] = {
    "data_size": require_count,
    "augmentation": require_positive_number,
    "mc_samples": require_count,
    "loss_reduction": _require_reduction,
    "max_grad_norm": lambda name, value: None if value is None else require_positive_number(name, value),
}


def settings_of_run(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `settings` that are not of parameter groups, with plain numbers.

    Raises:
        OptionError: one is out of its range.
    """
    return {name: check(name, settings[name]) for name, check in OF_RUN.items()}


def require_generator(name: str, generator: object) -> None:
    """Raise unless `generator` is a source of noise, or None.

    Raises:
        OptionError: it is something else.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise OptionError(
            f"{name}={generator!r} must be a torch.Generator, such as torch.Generator().manual_seed(0), or None."
        )


def require_scale(loss_scale: object) -> None:
    """Raise unless `loss_scale` is a number above 0, a function, or None.

    Raises:
        OptionError: it is something else.
    """
    if loss_scale is not None and not callable(loss_scale):
        require_positive_number("loss_scale", loss_scale)


def known_scale(loss_scale: float | Callable[[], float] | None) -> float | None:
    """Return the scale, from the function if it is one.

    Raises:
        OptionError: it is no number above 0.
    """
    return require_positive_number("loss_scale", loss_scale()) if callable(loss_scale) else loss_scale


def temperature_at(settings: Mapping[str, Any], step: int) -> float:
    """τ at a step, counted from 0: linear from its start to its final value, then constant.

    This is KL warm-up: τ weighs the divergence from the prior in the objective.
    """
    start, final, steps = (settings[f"temperature{part}"] for part in ("_start", "", "_steps"))
    value: float = final if step >= steps else start + (final - start) * step / steps
    return value


def groups_of(params: Any, model: nn.Module) -> list[Any]:
    """Return the parameters, or parameter groups, that the user wants to train.

    Args:
        params: what was given; None is all parameters that require a gradient.
        model: the network.

    Raises:
        OptionError: it is not such a list, or it is empty.
    """
    if params is None:
        params = (p for p in model.parameters() if p.requires_grad)
    if isinstance(params, Tensor | Mapping | str) or not isinstance(params, Iterable):
        raise OptionError(f"params is of type {type(params).__name__}: pass a list of parameters or of groups.")
    groups = _in_order(params)
    if not groups:
        raise OptionError(
            "There is nothing to train: the model has no parameter that requires a gradient, or params is empty."
        )
    kinds = {isinstance(group, Mapping) for group in groups}
    if len(kinds) > 1:
        raise OptionError("params holds both parameters and groups: make all of them groups.")
    return groups


def _in_order(params: Iterable[Any]) -> list[Any]:
    if isinstance(params, set | frozenset):
        raise OptionError("params is a set, whose order changes from run to run: pass a list.")
    return list(params)


def params_of_group(group: Any) -> list[Any]:
    """Return the parameters of a parameter group, as given.

    Raises:
        OptionError: it is no group, or has no parameters.
    """
    if not isinstance(group, Mapping) or "params" not in group:
        raise OptionError('A parameter group must be a dict with an entry "params".')
    params = group["params"]
    if isinstance(params, Tensor):
        return [params]
    if isinstance(params, Mapping | str) or not isinstance(params, Iterable):
        raise OptionError(f'"params" of a group is of type {type(params).__name__}: pass a list of parameters.')
    found = _in_order(params)
    if not found:
        raise OptionError('"params" of a group is empty: leave the group out.')
    return found


def name_params(model: nn.Module, params: Iterable[Any], taken: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return `params` keyed by their names in `model`.

    Args:
        model: the network.
        params: parameters, or pairs of a name (which is ignored) and a parameter, as PyTorch's optimizers take them.
        taken: parameters that belong to another group already.

    Raises:
        OptionError: an entry is not a parameter of the model, is frozen, or is there twice.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    taken_ids = {id(p) for p in taken}
    named: dict[str, Tensor] = {}
    for entry in params:
        param = entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry
        name = names.get(id(param))
        if name is None:
            what = f"a tensor of shape {tuple(param.shape)}" if isinstance(param, Tensor) else repr(param)
            raise OptionError(f"params holds {what}, which is not a parameter of the given model.")
        if not param.requires_grad:
            raise OptionError(f"params holds {name!r}, which is frozen: leave it out, or unfreeze it first.")
        if name in named or id(param) in taken_ids:
            raise OptionError(f"params holds {name!r} twice: name each parameter once, in one group.")
        named[name] = param
    return named


def each_weights(setting: str, value: Any, named: Mapping[str, Tensor]) -> Any:
    """Return a setting that may differ from weight to weight in the form that a group stores.

    Args:
        setting: its name.
        value: a number for all weights, or a mapping from names of parameters to tensors.
        named: the parameters of the group, by name.

    Returns:
        The number, or copies of the tensors in the order of `named`, which are found by position afterwards.

    Raises:
        OptionError: the mapping lacks a parameter, or a tensor has another shape.
    """
    if not isinstance(value, Mapping):
        return value
    tensors = []
    for name, param in named.items():
        if name in value and not isinstance(value[name], Tensor):
            raise OptionError(f"{setting}[{name!r}] is of type {type(value[name]).__name__}: pass a tensor.")
        shape = tuple(value[name].shape) if name in value else None
        if shape != tuple(param.shape):
            there = "lacks it" if shape is None else f"has shape {shape}"
            raise OptionError(
                f"{setting} must have a tensor for each parameter of the group in its shape: for {name!r} that is "
                f"{tuple(param.shape)}, but {setting} {there}."
            )
        dtype = torch.promote_types(param.dtype, torch.float32)
        tensors.append(value[name].detach().to(param.device, dtype, copy=True))
    return tensors
