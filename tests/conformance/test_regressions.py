"""Cases that once went wrong, found by chance or by users, kept by name; those of general interest are in the zoo."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from .case import Method, assert_right_or_refused
from .zoo import Entry, reals


class Difference(nn.Module):
    """f(x) + f(−x): of an odd f nothing is left, nor of its gradients."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.inner(-x)


class Functional(nn.Module):
    """Uses its only layer as a bag of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.inner.bias, x, self.inner.weight.mT)


def frozen_but(model: nn.Sequential, trained: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    trained.requires_grad_()
    return model


def before_a_norm_of_one_number() -> nn.Module:
    first = nn.Linear(2, 1)
    return frozen_but(nn.Sequential(first, nn.LayerNorm(1, eps=0.1)), first)


def weight_norm_of_one_input() -> nn.Module:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(1, 3))
    model.parametrizations.weight.original0.requires_grad_(False)
    model.bias.requires_grad_(False)
    return model


REGRESSIONS = {
    # The self-check took rounding for an error where every gradient vanishes in exact arithmetic.
    "Vanishing gradients before a norm of one number": Entry(
        frozenset({"linear", "layer norm", "frozen"}), before_a_norm_of_one_number, reals(2)
    ),
    "Vanishing gradients by cancellation": Entry(
        frozenset({"linear", "twice"}), lambda: Difference(nn.Linear(2, 3, bias=False)), reals(2)
    ),
    "Vanishing gradients of a normalised weight": Entry(
        frozenset({"parametrization", "frozen"}), weight_norm_of_one_input, reals(1)
    ),
    # The only layer of the model is not called as a module, so that no call was recorded and zeros came out.
    "No layer is called as a module": Entry(frozenset({"functional use"}), Functional, reals(2)),
}


@pytest.mark.parametrize("method", ["moments", "per_sample"])
@pytest.mark.parametrize("name", REGRESSIONS)
def test_is_right_or_refuses(backend: str, method: Method, name: str) -> None:
    for size in (1, 3):
        assert_right_or_refused(backend, REGRESSIONS[name].case(size), method)
