"""Models on which some backend was once wrong, refused without need, or took rounding for an error; kept by name."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from persample.testing.zoo.case import Case, Net, frozen, parameter, reals


def _sign_of_itself(model: Any, x: Tensor) -> Any:
    y: Tensor = model.inner(x.clone())
    return y * y.detach().sign()


def _sample_by_sample(model: Any, x: Tensor) -> Any:
    return torch.stack([torch.cat([model.inner(sample) * model.scale, model.token]).tanh() for sample in x])


def _checkpoint_in_checkpoint(model: Any, x: Tensor) -> Any:
    def inside(h: Tensor) -> Any:
        return F.linear(h, model.first.weight.tanh() @ torch.eye(4, dtype=h.dtype)).tanh()

    def outside(h: Tensor) -> Any:
        return model.second(checkpoint(inside, h, use_reentrant=False) * model.first.bias)

    return checkpoint(outside, model.first(x), use_reentrant=False)


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
    Case(
        "Sample by sample in a loop",
        lambda: Net(_sample_by_sample, inner=nn.Linear(3, 2), scale=parameter(2), token=parameter(2)),
        reals(3),
    ),
    Case(
        "Activation checkpointing inside activation checkpointing",
        lambda: Net(_checkpoint_in_checkpoint, first=nn.Linear(4, 4), second=nn.Linear(4, 4)),
        reals(3, 4),
    ),
    # Gradients of complex products take conjugates.
    Case(
        "Complex linear layer of two real parameters",
        lambda: Net(
            lambda m, x: torch.view_as_real(torch.fft.rfft(x) @ torch.complex(m.real, m.imaginary)).flatten(1),
            real=parameter(4, 3),
            imaginary=parameter(4, 3),
        ),
        reals(2, 6),
    ),
    Case(
        "Complex convolution of one real parameter",
        lambda: Net(
            lambda m, x: F.conv1d(torch.complex(x, x.sin()), torch.view_as_complex(m.weight)).abs() * m.scale,
            weight=parameter(3, 2, 2, 2),
            scale=parameter(),
        ),
        reals(2, 5),
    ),
)
