"""Gradients that `.backward()` would find and `torch.autograd.grad` would not: refused, never zero without a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import persample
from persample.errors import UnsupportedModelError

pytestmark = pytest.mark.filterwarnings("ignore")


class Reversible(torch.autograd.Function):
    """Computes its inside once more in the backward pass, and calls `.backward()` there, as reversible layers do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inside: nn.Module) -> Tensor:
        ctx.inside = inside
        ctx.save_for_backward(x)
        return inside(x).tanh()

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Any:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            torch.autograd.backward(ctx.inside(x).tanh(), delta)
        return x.grad, None


def reentrant(inside: nn.Module, h: Tensor) -> Tensor:
    return checkpoint(lambda h: inside(h).tanh(), h, use_reentrant=True)


def reversible(inside: nn.Module, h: Tensor) -> Tensor:
    return Reversible.apply(h, inside)


class Net(nn.Module):
    """Hides its inner layer from the graph, behind features that are computed without gradients or not."""

    def __init__(self, hide: Callable[[nn.Module, Tensor], Tensor], frozen_features: bool) -> None:
        super().__init__()
        self.features, self.inside, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.hide, self.frozen_features = hide, frozen_features

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x)
        # Fine-tuning with frozen features asks for the gradient of the features, or there would be none at all.
        h = h.detach().requires_grad_() if self.frozen_features else h
        return self.head(self.hide(self.inside, h))


@pytest.mark.parametrize("check", ["first", "never"])
@pytest.mark.parametrize("frozen_features", [False, True])
@pytest.mark.parametrize("hide", [reentrant, reversible])
@pytest.mark.parametrize("method", ["moments", "per_sample"])
def test_refused(backend: str, method: str, hide: Any, frozen_features: bool, check: Any, no_trace: Any) -> None:
    model, inputs, targets = Net(hide, frozen_features).double(), torch.randn(4, 3).double(), torch.arange(4) % 2
    persample.losses.cross_entropy(model(inputs), targets).sum().backward()
    assert model.inside.weight.grad is not None  # what an ordinary training would use
    source = persample.make_source(backend, model, persample.losses.cross_entropy, check=check)
    with no_trace(model, inputs, targets), pytest.raises(UnsupportedModelError):
        getattr(source, method)(inputs, targets)


@pytest.mark.parametrize("frozen_features", [False, True])
def test_reentrant_checkpointing_is_refused_without_a_check(backend: str, frozen_features: bool) -> None:
    model, inputs, targets = Net(reentrant, frozen_features).double(), torch.randn(4, 3).double(), torch.arange(4) % 2
    source = persample.make_source(backend, model, persample.losses.cross_entropy, check="never")
    with pytest.raises(UnsupportedModelError, match="use_reentrant=False"):
        source.moments(inputs, targets)


@pytest.mark.parametrize("backend", ["loop", "hooks", "fused"])
def test_features_without_gradient_are_served(backend: str, per_sample_truth: Any) -> None:
    model = Net(lambda inside, h: inside(h).tanh(), True).double()
    inputs, targets = torch.randn(4, 3).double(), torch.arange(4) % 2
    truth = per_sample_truth(model, persample.losses.cross_entropy, inputs, targets).gradients
    found = persample.make_source(backend, model, persample.losses.cross_entropy).per_sample(inputs, targets)
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12)
