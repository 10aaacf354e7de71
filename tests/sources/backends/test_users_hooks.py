"""Hooks of the user on parameters and outputs: they take part, or the model is refused before a number is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import persample
from persample.errors import UnsupportedModelError
from persample.testing.devices import generator_of


def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.sin() * targets).sum(1)


def batch() -> tuple[Tensor, Tensor]:
    generator = generator_of(0)
    return torch.randn(4, 3, generator=generator).double(), torch.randn(4, 2, generator=generator).double()


def gradients_one_by_one(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The gradient of the first layer's weight for each sample, as `.backward()` gives it, hooks included."""
    rows = []
    for i in range(len(inputs)):
        model.zero_grad()
        loss_fn(model(inputs[i : i + 1]), targets[i : i + 1]).sum().backward()
        rows.append(model.get_parameter("0.weight").grad.clone())
    model.zero_grad()
    return torch.stack(rows)


@pytest.mark.parametrize("check", ["first", "never"])
def test_hooks_on_parameters(backend: str, check: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model[0].weight.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
    inputs, targets = batch()
    source = persample.make_source(backend, model, loss_fn, check="never")
    if backend in ("loop", "vjp"):
        found = source.per_sample(inputs, targets)["0.weight"]
        torch.testing.assert_close(found, gradients_one_by_one(model, inputs, targets))
    else:
        with pytest.raises(UnsupportedModelError, match=r"'0.weight' has a hook .* remove the hook"):
            source.per_sample(inputs, targets)
        assert persample.explain(model, backend=backend) is not None


def test_hooks_on_a_frozen_parameter_are_no_matter(backend: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    model[0].weight.register_hook(lambda gradient: 1 / 0)
    model[0].requires_grad_(False)
    persample.make_source(backend, model, loss_fn).moments(*batch())


class DoubledBelow(nn.Sequential):
    """Doubles the gradient that reaches its first layer."""

    def forward(self, x: Tensor) -> Tensor:
        h = self[0](x)
        if h.requires_grad:
            h.register_hook(lambda gradient: 2 * gradient)
        output: Tensor = self[1](h.tanh())
        return output


@pytest.mark.parametrize("on_sequence", [False, True])
def test_hooks_on_outputs(backend: str, on_sequence: bool) -> None:
    model = DoubledBelow(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    inputs, targets = batch()
    if on_sequence:
        inputs, targets = inputs.unsqueeze(1).expand(-1, 5, -1), targets.unsqueeze(1).expand(-1, 5, -1)
    loss = lambda outputs, targets: loss_fn(outputs.flatten(1), targets.flatten(1))  # noqa: E731
    expected = persample.make_source("loop", model, loss, check="never").per_sample(inputs, targets)
    source = persample.make_source(backend, model, loss, check="never")
    if backend in ("hooks", "backpack (rules)", "opacus (rules)"):
        with pytest.raises(UnsupportedModelError, match=r"Linear '0' .* put the hook on a function of the output"):
            source.per_sample(inputs, targets)
    else:
        torch.testing.assert_close(source.per_sample(inputs, targets), expected)


class NormalisedBelow(nn.Sequential):
    """Makes the gradient that reaches its first layer one of length 1."""

    def forward(self, x: Tensor) -> Tensor:
        h = self[0](x).tanh()
        if h.requires_grad:
            h.register_hook(lambda gradient: gradient / gradient.norm())
        output: Tensor = self[1](h)
        return output


@pytest.mark.parametrize("method", ["per_sample", "moments"])
@pytest.mark.parametrize("backend", ["loop", "vjp", "fused", "hooks", "vmap"])
def test_hooks_that_are_not_linear_are_the_reason(backend: str, method: str) -> None:
    model = NormalisedBelow(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    with pytest.raises(UnsupportedModelError, match=r"nonlinear.* use backend 'vjp' with check='never'"):
        getattr(persample.make_source(backend, model, loss_fn), method)(*batch())
    inputs, targets = batch()
    for serving in ("loop", "vjp"):
        found = persample.make_source(serving, model, loss_fn, check="never").per_sample(inputs, targets)["0.weight"]
        torch.testing.assert_close(found, gradients_one_by_one(model, inputs, targets))


@pytest.mark.parametrize("recording_backend", ["fused", "hooks"])
def test_hooks_on_parameters_while_recording(recording_backend: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    source = persample.make_source(recording_backend, model, loss_fn, check="never")
    inputs, targets = batch()
    handle = model[0].weight.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
    with pytest.raises(UnsupportedModelError, match=r"'0.weight' has a hook"), source.recording():
        loss_fn(model(inputs), targets).mean().backward()
    handle.remove()
    with source.recording() as recorded:
        loss_fn(model(inputs), targets).mean().backward()
    expected = persample.make_source("loop", model, loss_fn, check="never").moments(inputs, targets)
    torch.testing.assert_close(recorded.moments().second_moment, expected.second_moment)
