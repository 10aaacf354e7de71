"""Training failures: a first step that is too long, infinite numbers, a posterior without precision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from persample.errors import OptionError, PersampleError
from persample.kernels.step import all_finite
from persample.warn import warn

# Measured on small convolutional networks: above this length of lr / (hess_init + λ/N), ReLUs die or training diverges.
LONGEST_FIRST_STEP = 0.5

# A single bad batch is passed over; so many in a row mean that the training has gone wrong.
MOST_SKIPPED_STEPS = 5


class DangerousFirstStepWarning(UserWarning):
    """The first step of VOGN is so long that ReLUs may die or training may diverge."""


class SkippedStepWarning(UserWarning):
    """A step was skipped, because the mean or its precision would have become infinite or NaN."""


class NonFiniteError(PersampleError, ArithmeticError):
    """Several steps in a row would have made the mean or its precision infinite or NaN."""


def warn_of_first_step(settings: Mapping[str, Any], data_size: float, temperature: float) -> None:
    """Warn with `DangerousFirstStepWarning` if α / (s_0 + d + τ λ/N) is above `LONGEST_FIRST_STEP`.

    On its first step VOGN moves the mean by that many gradients. With s_0 = 0, as printed, that is α N / λ.
    """
    lr, hess_init, damping, precision = (settings[n] for n in ("lr", "hess_init", "damping", "prior_precision"))
    if isinstance(precision, list):
        precision = min((t.min().item() for t in precision if t.numel()), default=0.0)
    prior = damping + temperature * precision / data_size
    length = lr / (hess_init + prior)
    if length > LONGEST_FIRST_STEP:
        weight = "" if temperature == 1 else f"{temperature:g} * "
        terms = [f"{hess_init:g}", *([f"{damping:g}"] if damping else []), f"{weight}{precision:g} / {data_size:g}"]
        names = ["hess_init", *(["damping"] if damping else []), f"{weight}prior_precision / data_size"]
        warn(
            f"The first step moves the mean by lr / ({' + '.join(names)}) = {lr:g} / ({' + '.join(terms)}) = "
            f"{length:.3g} gradients; above about {LONGEST_FIRST_STEP} networks often die or diverge. Set hess_init "
            f"to at least {lr / LONGEST_FIRST_STEP - prior:.2g}, or lr to at most "
            f"{LONGEST_FIRST_STEP * (hess_init + prior):.2g}.",
            DangerousFirstStepWarning,
        )


def first_non_finite(tensors: list[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor with an infinite or NaN entry; None if there is none.

    Args:
        tensors: pairs of a name and a tensor.
    """
    if all_finite([tensor for _, tensor in tensors]):
        return None
    # A norm is finite only if all entries are, and far cheaper to get than a look at each entry. Only if it is not, the
    # single entries decide, because the squares of finite numbers may overflow.
    norms = torch._foreach_norm([tensor for _, tensor in tensors])
    if math.isfinite(torch.stack([norm.to(norms[0].device) for norm in norms]).sum().item()):
        return None
    return next((name for name, tensor in tensors if not bool(tensor.isfinite().all())), None)


def skip_step(name: str, skipped: int) -> None:
    """Warn that a step was skipped; raise if too many were skipped in a row.

    Args:
        name: the parameter whose mean or precision would have become infinite or not a number.
        skipped: how many steps in a row were skipped, this one included.

    Raises:
        NonFiniteError: `skipped` has reached `MOST_SKIPPED_STEPS`.
    """
    what = (
        f"The step would have made the mean of {name!r} or its precision infinite or NaN, so it was skipped: nothing "
        "was changed, and its observations are discarded."
    )
    if skipped >= MOST_SKIPPED_STEPS:
        raise NonFiniteError(
            f"{what} It is step {skipped} in a row: check the batches, lower lr, or make the first posterior narrower "
            "(raise hess_init or prior_precision)."
        )
    warn(what, SkippedStepWarning)


def require_positive(precision: Mapping[str, Tensor]) -> None:
    """Check that the posterior is proper: all precisions are positive.

    Raises:
        OptionError: one is not; its parameter is in the message.
    """
    for name, value in precision.items():
        if not bool((value > 0).all()):
            raise OptionError(
                f"With prior_precision=0 and curvature 0 the posterior of {name!r} has precision N s + λ = 0, so no "
                "weight can be drawn from it: pass a positive prior_precision."
            )
