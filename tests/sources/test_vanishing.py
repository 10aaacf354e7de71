"""Gradients that vanish in exact arithmetic are told from small ones, and no other is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from persample.sources.vanishing import rounding_left


def gradients_of(loss: Callable[[nn.Module], Tensor]) -> Callable[[nn.Module], dict[str, Tensor]]:
    def gradients(model: nn.Module) -> dict[str, Tensor]:
        parameters = dict(model.named_parameters())
        found = torch.autograd.grad(loss(model), list(parameters.values()), allow_unused=True)
        return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}

    return gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_cancels_is_found(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (4, 1)), nn.LayerNorm(1)).to(dtype)
    x, weights = torch.randn(5, 3, dtype=dtype), torch.randn(5, 4, 1, dtype=dtype)
    gradients = gradients_of(lambda m: (m(x) * weights).sum())
    left, found = rounding_left(model, gradients, dtype), gradients(model)
    for name in ("0.weight", "0.bias"):
        assert found[name].abs().max() <= left[name]
        assert 0 < left[name] < 1e5 * torch.finfo(dtype).eps
    assert left["2.bias"] == 0


@pytest.mark.parametrize("saturation", [0, 10, 30])
def test_what_is_small_does_not_vanish(saturation: float) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 4).double(), torch.randn(5, 3).double()
    gradients = gradients_of(lambda m: (1 + torch.sigmoid(m(x) - saturation)).square().sum())
    assert rounding_left(model, gradients, torch.float64) == {"weight": 0, "bias": 0}


def test_exact_zeros_have_no_rounding() -> None:
    model, x = nn.Linear(3, 4).double(), torch.randn(5, 3).double()
    assert rounding_left(model, gradients_of(lambda m: m.weight.sum()), torch.float64) == {"weight": 0, "bias": 0}
    assert rounding_left(model, gradients_of(lambda m: (m(x) * 0).sum()), torch.float64) == {"weight": 0, "bias": 0}
