"""Models on which some backend was once wrong, refused without need, or took rounding for an error; kept by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from persample.testing.zoo.case import Case, Net, frozen, reals


def _sign_of_itself(model: Any, x: Tensor) -> Any:
    y: Tensor = model.inner(x.clone())
    return y * y.detach().sign()


CASES = (
    # The self-check took rounding for an error where every gradient vanishes in exact arithmetic.
    Case(
        "Vanishing gradients before a norm of one number",
        lambda: nn.Sequential(nn.Linear(2, 1), frozen(nn.LayerNorm(1, eps=0.1))),
        reals(2),
    ),
    Case(
        "Vanishing gradients by cancellation",
        lambda: Net(lambda m, x: m.inner(x) + m.inner(-x), inner=nn.Linear(2, 3, bias=False)),
        reals(2),
    ),
    Case(
        "Vanishing gradients of a normalised weight",
        lambda: frozen(parametrizations.weight_norm(nn.Linear(1, 3)), "bias", "parametrizations.weight.original0"),
        reals(1),
    ),
    # The only layer of the model is not called as a module, so that no call was recorded and zeros came out.
    Case(
        "No layer is called as a module",
        lambda: Net(lambda m, x: torch.addmm(m.inner.bias, x, m.inner.weight.mT), inner=nn.Linear(2, 3)),
        reals(2),
    ),
    Case("Sign of itself", lambda: Net(_sign_of_itself, inner=nn.Linear(4, 4)), reals(4)),
)
