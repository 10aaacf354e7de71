"""What VOGN refuses and warns about: settings out of range, infinite numbers, a first step that is too long."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import torch

from persample.errors import OptionError, PersampleError
from persample.vogn.core import Tensors

# Measured on small convolutional networks: above this length of lr / (hess_init + λ/N), ReLUs die or training diverges.
LONGEST_FIRST_STEP = 0.5

_SETTINGS: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    "lr": ("a number >= 0", lambda v: v >= 0),
    "prior_precision": ("a number >= 0", lambda v: v >= 0),
    "decay": ("a number from 0 to 1", lambda v: 0 <= v <= 1),
    "hess_init": ("a number >= 0", lambda v: v >= 0),
    "momentum": ("a number >= 0 and < 1", lambda v: 0 <= v < 1),
}


class DangerousFirstStepWarning(UserWarning):
    """The first step of VOGN is long enough to kill ReLUs or to diverge."""


class NonFiniteError(PersampleError, ArithmeticError):
    """Gradients or updated parameters are infinite or not a number."""


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


def warn_of_first_step(settings: Mapping[str, Any], data_size: int, stacklevel: int) -> None:
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
            stacklevel=stacklevel + 1,
        )


def check_finite(what: str, names: Iterable[str], tensors: Tensors) -> None:
    """Check that all `tensors` are finite.

    Raises:
        NonFiniteError: one is not; `what` and its name are in the message.
    """
    # A sum is finite only if all its terms are, and by far the cheapest thing to look at; if the sum is not, single
    # numbers decide, since a sum of finite numbers may overflow.
    device = tensors[0].device
    if bool(torch.stack([t.sum().to(device) for t in tensors]).sum().isfinite()):
        return
    for name, tensor in zip(names, tensors, strict=True):
        if not bool(tensor.isfinite().all()):
            raise NonFiniteError(
                f"{what} of {name} would be infinite or not a number; nothing was changed. Lower lr, raise hess_init "
                "or prior_precision, or look at the batch; zero_grad() forgets what was observed."
            )
