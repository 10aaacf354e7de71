"""Recurrent layers run without cuDNN where it cannot repeat them, and nothing else is switched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import persample
from persample.sources.model.recurrent_layers import without_cudnn
from persample.testing.devices import on_cuda


def settings() -> tuple[object, ...]:
    cudnn = torch.backends.cudnn
    return cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("allowed", [True, False])
def test_cudnn_alone_is_switched_off_and_on_again(allowed: bool) -> None:
    products = torch.backends.cuda.matmul
    enabled, own = torch.backends.cudnn.enabled, products.allow_tf32
    products.allow_tf32 = allowed
    try:
        before = settings()
        with without_cudnn():
            assert not torch.backends.cudnn.enabled
            assert settings() == before
            with without_cudnn():
                pass
            assert not torch.backends.cudnn.enabled
        assert (torch.backends.cudnn.enabled, settings()) == (enabled, before)
    finally:
        products.allow_tf32 = own


@pytest.mark.skipif(not on_cuda(), reason="needs a GPU (PERSAMPLE_TEST_DEVICE=cuda)")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_layers_in_eval_mode_have_a_backward_pass_on_a_gpu(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = kind(3, 4, num_layers=2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)[0][:, -1]

    model = Last().double().eval()
    x, y = torch.randn(5, 6, 3, dtype=torch.float64), torch.randint(4, (5,))
    found = []
    for backend in ("loop", "fused"):
        found.append(persample.make_source(backend, model, persample.losses.cross_entropy).moments(x, y))
    for name, value in found[0].mean.items():
        torch.testing.assert_close(found[1].mean[name], value)
        torch.testing.assert_close(found[1].second_moment[name], found[0].second_moment[name])
