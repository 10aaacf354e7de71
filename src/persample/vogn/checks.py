"""What VOGN refuses, and what it warns of: wrong settings and parameters, infinite numbers, a first step too long."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from persample.errors import OptionError, PersampleError

# Measured on small convolutional networks: above this length of lr / (hess_init + λ/N), ReLUs die or training diverges.
LONGEST_FIRST_STEP = 0.5

# A single bad batch is passed over; so many in a row mean that the training has gone wrong.
MOST_SKIPPED_STEPS = 5

_SETTINGS: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    "lr": ("a number >= 0", lambda v: v >= 0),
    "prior_precision": ("a number >= 0", lambda v: v >= 0),
    "decay": ("a number from 0 to 1", lambda v: 0 <= v <= 1),
    "hess_init": ("a number >= 0", lambda v: v >= 0),
    "momentum": ("a number >= 0 and < 1", lambda v: 0 <= v < 1),
}


class DangerousFirstStepWarning(UserWarning):
    """The first step of VOGN is long enough to kill ReLUs or to diverge."""


class SkippedStepWarning(UserWarning):
    """A step was skipped, because it would have made the mean or the curvature infinite or not a number."""


class NonFiniteError(PersampleError, ArithmeticError):
    """Several steps in a row would have made the mean or the curvature infinite or not a number."""


def check_count(name: str, value: object) -> int:
    """Return `value` if it is a whole number >= 1.

    Raises:
        OptionError: it is not.
    """
    if not isinstance(value, Integral) or value < 1:
        raise OptionError(f"{name}={value!r}: must be a whole number >= 1.")
    return int(value)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check the settings of a parameter group.

    Raises:
        OptionError: a value is out of its range, or the first posterior would have precision 0.
    """
    for name, (allowed, holds) in _SETTINGS.items():
        value = settings[name]
        if not isinstance(value, Real) or not math.isfinite(value) or not holds(float(value)):
            raise OptionError(f"{name}={value!r}: must be {allowed}.")
    if settings["order"] not in ("printed", "updated"):
        raise OptionError(f'order={settings["order"]!r}: must be "printed" or "updated".')
    if settings["hess_init"] == 0 and settings["prior_precision"] == 0:
        raise OptionError(
            "hess_init=0 and prior_precision=0 together give the first posterior the precision N s + λ = 0, from "
            "which no weight can be drawn: make one of them positive."
        )


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
        param = entry[1] if isinstance(entry, tuple) else entry
        name = names.get(id(param))
        if name is None:
            what = f"a tensor of shape {tuple(param.shape)}" if isinstance(param, Tensor) else repr(param)
            raise OptionError(f"params holds {what}, which is not a parameter of the model that VOGN was given.")
        if not param.requires_grad:
            raise OptionError(f"params holds {name!r}, which is frozen: leave it out, or unfreeze it first.")
        if name in named or id(param) in taken_ids:
            raise OptionError(f"params holds {name!r} twice: name each parameter once, in one group.")
        named[name] = param
    return named


def warn_of_first_step(settings: Mapping[str, Any], data_size: int) -> None:
    """Warn with `DangerousFirstStepWarning` if α / (s_0 + λ/N) is above `LONGEST_FIRST_STEP`.

    On its first step VOGN moves the mean by that many gradients. With s_0 = 0, as printed, that is α N / λ.
    """
    lr, hess_init, prior_precision = (settings[name] for name in ("lr", "hess_init", "prior_precision"))
    prior = prior_precision / data_size
    length = lr / (hess_init + prior)
    if length > LONGEST_FIRST_STEP:
        warnings.warn(
            f"The first step of VOGN moves the mean by lr / (hess_init + prior_precision / data_size) = "
            f"{lr:g} / ({hess_init:g} + {prior_precision:g} / {data_size}) = {length:.3g} gradients; above about "
            f"{LONGEST_FIRST_STEP} networks often die or diverge. Set hess_init to at least "
            f"{lr / LONGEST_FIRST_STEP - prior:.2g}, or lr to at most "
            f"{LONGEST_FIRST_STEP * (hess_init + prior):.2g}.",
            DangerousFirstStepWarning,
            stacklevel=6,  # the line that called optimizer.step(), which PyTorch wraps twice
        )


def first_non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor with an entry that is infinite or not a number, None if there is none."""
    # Norms are finite only if all entries are, and far cheaper to get than to look at each entry. Only if they are
    # not, the single entries decide, because the norm of finite numbers may overflow.
    norms = torch._foreach_norm(list(tensors.values()), 1) if tensors else ()
    if not norms or bool(torch.stack([norm.to(norms[0].device) for norm in norms]).sum().isfinite()):
        return None
    return next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None)


def skip_step(name: str, skipped: int) -> None:
    """Warn that a step was skipped, or raise if too many were skipped one after the other.

    Args:
        name: the parameter whose mean or curvature would have become infinite or not a number.
        skipped: how many steps in a row were skipped, this one included.

    Raises:
        NonFiniteError: `skipped` has reached `MOST_SKIPPED_STEPS`.
    """
    what = (
        f"The step would have made the mean or the curvature of {name!r} infinite or not a number, so it was skipped: "
        "nothing was changed, and what was observed for it is forgotten."
    )
    if skipped >= MOST_SKIPPED_STEPS:
        raise NonFiniteError(
            f"{what} It is the {skipped}th in a row: look at the batches, lower lr, or raise hess_init or "
            "prior_precision."
        )
    warnings.warn(what, SkippedStepWarning, stacklevel=5)  # the line that called optimizer.step()


def check_positive(curvature: Mapping[str, Tensor]) -> None:
    """Check that the posterior is proper where the prior is flat: all entries of s are above 0.

    Raises:
        OptionError: one is not; its parameter is in the message.
    """
    for name, s in curvature.items():
        if not bool((s > 0).all()):
            raise OptionError(
                f"With prior_precision=0 and curvature 0 the posterior of {name!r} has precision N s + λ = 0, and no "
                "weight can be drawn from it: give it a positive prior_precision."
            )
