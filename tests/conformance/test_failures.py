"""Exceptions from inside forward, loss and backward pass on, and leave the model as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import persample
from persample.errors import UnsupportedModelError

from .architectures import cases
from .backend_promises import promise_of
from .case import Case
from .modules import Bomb
from .trace import no_trace


class BlownUpError(Exception):
    """An error that no library knows."""


class _BackwardBomb(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise BlownUpError


class BackwardBomb(nn.Module):
    """Raises in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = _BackwardBomb.apply(x)
        return output


@contextmanager
def blows_up(*others: type[Exception]) -> Iterator[None]:
    with pytest.raises((BlownUpError, *others)):
        yield


def _with_gradients(model: nn.Module) -> None:
    """Let a part of the parameters have a gradient from before, that must stay."""
    for i, parameter in enumerate(model.parameters()):
        if i % 2 and parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, float(i))


def _source(backend: str, case: Case, check: str = "first") -> persample.PerSampleGradSource:
    return persample.make_source(backend, case.model, case.loss_fn, check=check, **promise_of(backend).options)


def _with_bomb(case: Case, bomb: nn.Module, place: int) -> Case:
    layers = list(case.model.chain)
    layers.insert(place % (len(layers) + 1), bomb)
    case.model.chain = nn.Sequential(*layers)
    return case


#: A backend that refuses the model does so before it gets to the error.
_OR_REFUSES = UnsupportedModelError


@given(
    case=cases(),
    place=st.integers(0, 4),
    calls_before=st.integers(0, 2),
    method=st.sampled_from(["moments", "per_sample"]),
)
def test_error_in_forward(backend: str, case: Case, place: int, calls_before: int, method: str) -> None:
    bomb = Bomb(BlownUpError, calls_before)
    case = _with_bomb(case, bomb, place)
    _with_gradients(case.model)
    source = _source(backend, case, check="always")
    with no_trace(case.model, case.inputs, case.targets):
        try:
            getattr(source, method)(case.inputs, case.targets)
        except (BlownUpError, _OR_REFUSES):
            pass
        else:
            assert bomb.calls_left[0] > 0, "the error was swallowed"


@given(case=cases(), method=st.sampled_from(["moments", "per_sample"]))
def test_error_in_loss(backend: str, case: Case, method: str) -> None:
    def blow_up(outputs: Tensor, targets: Any) -> Tensor:
        raise BlownUpError

    _with_gradients(case.model)
    source = _source(backend, dataclasses.replace(case, loss_fn=blow_up))
    with no_trace(case.model, case.inputs, case.targets), blows_up(_OR_REFUSES):
        getattr(source, method)(case.inputs, case.targets)


@pytest.mark.parametrize("method", ["moments", "per_sample"])
@pytest.mark.parametrize("make_error", [BlownUpError, RuntimeError, ValueError, KeyError])
def test_errors_of_the_users_code_pass_on(backend: str, make_error: Callable[..., Exception], method: str) -> None:
    error = make_error("seven bells")
    model = nn.Sequential(nn.Linear(3, 3), Bomb(lambda: error), nn.Linear(3, 2)).double()
    _with_gradients(model)
    source = persample.make_source(backend, model, persample.losses.cross_entropy, **promise_of(backend).options)
    inputs, targets = torch.randn(4, 3).double(), torch.tensor([0, 1, 0, 1])
    with no_trace(model, inputs, targets), pytest.raises(make_error, match="seven bells") as raised:
        getattr(source, method)(inputs, targets)
    assert not isinstance(raised.value, persample.PersampleError)


@pytest.mark.parametrize("method", ["moments", "per_sample"])
def test_error_in_backward(backend: str, method: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), BackwardBomb(), nn.Linear(3, 2)).double()
    _with_gradients(model)
    source = persample.make_source(backend, model, persample.losses.cross_entropy, **promise_of(backend).options)
    inputs, targets = torch.randn(4, 3).double(), torch.tensor([0, 1, 0, 1])
    with no_trace(model, inputs, targets), blows_up(_OR_REFUSES):
        getattr(source, method)(inputs, targets)


def test_works_again_after_an_error(backend: str) -> None:
    bomb = Bomb(BlownUpError)
    model = nn.Sequential(nn.Linear(3, 4), bomb, nn.Tanh(), nn.Linear(4, 2)).double()
    inputs, targets = torch.randn(4, 3).double(), torch.tensor([0, 1, 0, 1])
    source = persample.make_source(backend, model, persample.losses.cross_entropy, **promise_of(backend).options)
    with blows_up(_OR_REFUSES):
        source.moments(inputs, targets)
    repaired = nn.Sequential(model[0], model[2], model[3])
    source = persample.make_source(backend, repaired, persample.losses.cross_entropy, **promise_of(backend).options)
    mean = source.moments(inputs, targets).mean["2.weight"]
    persample.losses.cross_entropy(repaired(inputs), targets).mean().backward()
    torch.testing.assert_close(mean, repaired[2].weight.grad)
