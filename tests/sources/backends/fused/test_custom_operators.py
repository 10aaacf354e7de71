"""Operators of libraries other than PyTorch, such as torchvision's: exact, or refused where they mix the samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import persample
from persample.errors import UnsupportedModelError
from persample.sources.contract import Check
from persample.testing.zoo.case import Net


@torch.library.custom_op("persample_tests::scaled", mutates_args=())
def scaled(x: Tensor, w: Tensor) -> Tensor:
    return x * w.sin()


def _scaled_backward(ctx: Any, delta: Tensor) -> tuple[Tensor, Tensor]:
    x, w = ctx.saved_tensors
    return delta * w.sin(), (delta * x * w.cos()).sum(0)


@torch.library.custom_op("persample_tests::read", mutates_args=())
def read(x: Tensor, at: Tensor) -> Tensor:
    """Read x at places that are given as floating-point numbers, as deformable convolutions do."""
    assert not at.isnan().any(), "a kernel in C++ would end the process"
    return x.gather(1, at.clamp(0, x.shape[1] - 1).long())


def _read_backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None]:
    x, at = ctx.saved_tensors
    return torch.zeros_like(x).scatter_add(1, at.clamp(0, x.shape[1] - 1).long(), delta), None


@torch.library.custom_op("persample_tests::centred", mutates_args=())
def centred(x: Tensor) -> Tensor:
    return x - x.mean(0)


@torch.library.custom_op("persample_tests::dropped", mutates_args=())
def dropped(x: Tensor, w: Tensor) -> Tensor:
    return x * w * torch.empty_like(x).bernoulli_(0.5)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


scaled.register_autograd(_scaled_backward, setup_context=_keep)
read.register_autograd(_read_backward, setup_context=_keep)
centred.register_autograd(lambda ctx, delta: delta - delta.mean(0))
dropped.register_autograd(lambda ctx, delta: (delta, delta.sum(0)))


def net(function: Any) -> nn.Module:
    torch.manual_seed(0)
    parts = {"first": nn.Linear(4, 4), "last": nn.Linear(4, 2), "w": nn.Parameter(torch.randn(4))}
    return Net(function, **parts).double()


def losses(outputs: Tensor, targets: Any) -> Tensor:
    return outputs.sin().flatten(1).sum(1)


SERVED = {
    "of samples alone": lambda m, x: m.last(read(m.first(x), x * 2 + 1)),
    "at places of the samples' own": lambda m, x: m.last(read(h := m.first(x), h.detach() * 2 + 1) * m.w),
    "with a parameter": lambda m, x: m.last(scaled(m.first(x), m.w)),
    "with an expression": lambda m, x: m.last(scaled(m.first(x).relu(), m.w.exp()[[1, 0, 2, 2]])),
}


@pytest.mark.parametrize("check", ["first", "never"])
@pytest.mark.parametrize("name", SERVED)
def test_exact(name: str, check: Check, per_sample_truth: Any) -> None:
    model, x = net(SERVED[name]), torch.randn(5, 4).double()
    source = persample.make_source("fused", model, losses, check=check)
    truth = per_sample_truth(model, losses, x, None).gradients
    torch.testing.assert_close(source.per_sample(x, None), truth)
    expected = {key: g.square().mean(0) for key, g in truth.items()}
    torch.testing.assert_close(source.moments(x, None).second_moment, expected)


@pytest.mark.parametrize("name", ["mixes the samples", "draws random numbers"])
def test_refused(name: str) -> None:
    functions = {
        "mixes the samples": lambda m, x: m.last(centred(m.first(x))),
        "draws random numbers": lambda m, x: m.last(dropped(m.first(x), m.w)),
    }
    source = persample.make_source("fused", net(functions[name]), losses, check="never")
    with pytest.raises(UnsupportedModelError):
        source.moments(torch.randn(5, 4).double(), None)
