"""The oracle: per-sample gradients known in closed form, and when it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import persample
from persample import losses
from persample.errors import UnsupportedModelError


@given(size=st.integers(1, 6), width=st.integers(1, 4), seed=st.integers(0, 1000))
def test_linear_regression(size: int, width: int, seed: int) -> None:
    """ℓ_i = ½ (w·x_i + b − y_i)² has the gradient r_i x_i for w and r_i for b, with the residual r_i."""
    torch.manual_seed(seed)
    model = nn.Linear(width, 1).double()
    x, y = torch.randn(size, width).double(), torch.randn(size, 1).double()
    source = persample.make_source("loop", model, losses.gaussian)
    residual = (x @ model.weight.detach().mT + model.bias.detach() - y).numpy(force=True)
    weight, bias = residual[:, :, None] * x.numpy(force=True)[:, None, :], residual

    gradients = source.per_sample(x, y)
    np.testing.assert_allclose(gradients["weight"].cpu(), weight, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(gradients["bias"].cpu(), bias, rtol=1e-12, atol=1e-14)

    moments = source.moments(x, y)
    np.testing.assert_allclose(moments.mean["weight"].cpu(), weight.mean(0), rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(moments.second_moment["weight"].cpu(), (weight**2).mean(0), rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(moments.second_moment["bias"].cpu(), (bias**2).mean(0), rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(
        moments.losses.cpu(), 0.5 * residual[:, 0] ** 2 + 0.5 * np.log(2 * np.pi), rtol=1e-12, atol=1e-14
    )


@given(size=st.integers(1, 5), classes=st.integers(2, 4), seed=st.integers(0, 1000))
def test_softmax_regression(size: int, classes: int, seed: int) -> None:
    """The gradient of the cross entropy at the logits is softmax − one-hot."""
    torch.manual_seed(seed)
    model = nn.Linear(3, classes).double()
    x, labels = torch.randn(size, 3).double(), torch.randint(classes, (size,))
    logits = model(x).detach().numpy(force=True)
    delta = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(classes)[labels.numpy(force=True)]
    gradients = persample.make_source("loop", model, losses.cross_entropy).per_sample(x, labels)
    np.testing.assert_allclose(
        gradients["weight"].cpu(), delta[:, :, None] * x.numpy(force=True)[:, None, :], rtol=1e-10, atol=1e-13
    )
    np.testing.assert_allclose(gradients["bias"].cpu(), delta, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("method", ["moments", "per_sample"])
def test_dropout_is_that_of_one_ordinary_forward_pass(method: str) -> None:
    """The output is w · dropout(1): the gradient shows the mask."""
    model, inputs = nn.Sequential(nn.Dropout(), nn.Linear(20, 1, bias=False)).double(), torch.ones(4, 20).double()
    torch.manual_seed(5)
    mask = model[0](inputs)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    source = persample.make_source("loop", model, lambda outputs, targets: outputs.flatten())
    result: Any = getattr(source, method)(inputs, None)
    assert torch.equal(torch.get_rng_state(), state)
    if method == "per_sample":
        assert torch.equal(result["1.weight"].squeeze(1), mask)
    else:
        torch.testing.assert_close(result.second_moment["1.weight"].squeeze(0), mask.square().mean(0))
        torch.testing.assert_close(result.losses, (mask @ model[1].weight.detach().mT).flatten())


@pytest.mark.parametrize(
    "mix", [lambda x: x.softmax(0), lambda x: x - x.mean(0), lambda x: x / len(x), lambda x: x.flip(0)]
)
def test_mixing_is_refused_without_the_self_check(mix: Any) -> None:
    class Mixing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = mix(x)
            return output

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), Mixing()).double()
    source = persample.make_source("loop", model, losses.cross_entropy, check="never")
    with pytest.raises(UnsupportedModelError, match="mixes the samples"):
        source.per_sample(torch.randn(5, 3).double(), torch.arange(5) % 2)


def test_running_buffers_are_updated_once() -> None:
    class Average(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("average", torch.zeros(3).double())

        def forward(self, x: Tensor) -> Tensor:
            self.average.mul_(0.5).add_(x.detach().mean(0))
            return x

    inputs, targets = torch.randn(5, 3).double(), torch.arange(5) % 2
    ordinary = Average()
    ordinary(inputs)
    model = nn.Sequential(Average(), nn.Linear(3, 2)).double()
    persample.make_source("loop", model, losses.cross_entropy).moments(inputs, targets)
    assert model[0].average.tolist() in ([0.0, 0.0, 0.0], ordinary.average.tolist())
