"""Gradients that vanish in exact arithmetic are told from small ones, and no other is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from persample.sources.selfcheck.perturbation import rounding_left
from persample.testing.devices import on_cuda


def gradients_of(loss: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[nn.Module, Tensor], dict[str, Tensor]]:
    def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        parameters = dict(model.named_parameters())
        found = torch.autograd.grad(loss(model, x), list(parameters.values()), allow_unused=True)
        return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}

    return gradients


@pytest.mark.skipif(on_cuda(), reason="there the same sums cancel exactly")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_cancels_is_found(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (4, 1)), nn.LayerNorm(1)).to(dtype)
    x, weights = torch.randn(5, 3, dtype=dtype), torch.randn(5, 4, 1, dtype=dtype)
    gradients = gradients_of(lambda m, x: (m(x) * weights).sum())
    left, found = rounding_left(model, x, gradients, dtype), gradients(model, x)
    for name in ("0.weight", "0.bias"):
        assert found[name].abs().max() <= left[name]
        assert 0 < left[name] < 1e5 * torch.finfo(dtype).eps
    assert left["2.bias"] == 0


@pytest.mark.parametrize("saturation", [0, 10, 30])
def test_what_is_small_does_not_vanish(saturation: float) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 4).double(), torch.randn(5, 3).double()
    gradients = gradients_of(lambda m, x: (1 + torch.sigmoid(m(x) - saturation)).square().sum())
    assert rounding_left(model, x, gradients, torch.float64) == {"weight": 0, "bias": 0}


def test_exact_zeros_have_no_rounding() -> None:
    model, x = nn.Linear(3, 4).double(), torch.randn(5, 3).double()
    assert rounding_left(model, x, gradients_of(lambda m, x: m.weight.sum()), torch.float64) == {"weight": 0, "bias": 0}
    assert rounding_left(model, x, gradients_of(lambda m, x: (m(x) * 0).sum()), torch.float64) == {
        "weight": 0,
        "bias": 0,
    }


@pytest.mark.skipif(on_cuda(), reason="there the same sums cancel exactly")
def test_the_inputs_are_moved_too() -> None:
    torch.manual_seed(0)
    model, x = nn.LayerNorm(1).double(), torch.randn(5, 1).double()
    left = rounding_left(model, x, gradients_of(lambda m, x: (m(x) * x).sum()), torch.float64)
    assert 0 < left["weight"] < 1e-10
    assert left["bias"] == 0
