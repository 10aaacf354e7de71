"""Inputs that require a gradient: a model or a loss may differentiate by them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import persample
from persample.errors import UnsupportedModelError

#: The backends that serve what differentiates by its inputs.
SERVING = ("loop", "vmap", "vjp")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()


class Field(nn.Module):
    """Returns its inputs beside the outputs, as physics-informed networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.net(x)


def residual(u: Tensor, x: Tensor) -> Tensor:
    """The squared residual of ∂u/∂x_0 = u."""
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return (slope[:, 0] - u[:, 0]).square()


def alone(model: nn.Module, loss: Any, x: Tensor) -> dict[str, Tensor]:
    """The gradient of each sample by itself."""
    rows = []
    for point in x.detach():
        losses = loss(model, point.unsqueeze(0).clone().requires_grad_())
        rows.append(torch.autograd.grad(losses.sum(), list(model.parameters()), materialize_grads=True))
    return {
        name: torch.stack(g) for (name, _), g in zip(model.named_parameters(), zip(*rows, strict=True), strict=True)
    }


def is_exact(backend: str, model: nn.Module, loss_fn: Any, x: Any, targets: Any, expected: dict[str, Tensor]) -> bool:
    """Whether `backend` serves the model, and then exactly; what it refuses, it refuses in words."""
    source = persample.make_source(backend, model, loss_fn)
    try:
        torch.testing.assert_close(source.per_sample(x, targets), expected)
        moments = source.moments(x, targets)
    except UnsupportedModelError:
        return False
    torch.testing.assert_close(dict(moments.second_moment), {n: g.square().mean(0) for n, g in expected.items()})
    return True


def test_the_loss_differentiates_by_inputs_that_the_model_returns(backend: str, no_trace: Any) -> None:
    model, x = Field(), torch.randn(4, 2).double().requires_grad_()
    expected = alone(model, lambda m, point: residual(m(point)[1], point), x)
    with no_trace(model, x):
        served = is_exact(backend, model, lambda outputs, _: residual(outputs[1], outputs[0]), x, None, expected)
    assert served or backend not in SERVING
    assert x.grad is None


def test_the_loss_differentiates_by_inputs_that_are_targets_too(backend: str) -> None:
    model, x = network(), torch.randn(4, 2).double().requires_grad_()
    expected = alone(model, lambda m, point: residual(m(point), point), x)
    assert is_exact(backend, model, residual, x, x, expected) or backend not in SERVING


def test_inputs_enter_as_leaves_without_the_history_of_the_users(backend: str) -> None:
    seen = []

    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 3)

        def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Any:
            seen.append([(t.requires_grad, t.is_leaf) for t in (x, y, z)])
            return self.inner(x + y + z)

    x, plain = torch.randn(3, 2).requires_grad_(), torch.randn(3, 2)
    encoded = x * plain
    source = persample.make_source(backend, Looking(), lambda outputs, _: outputs.square().sum(1))
    source.moments((x, plain, encoded), None)
    assert all(flags == [(True, True), (False, True), (True, False)] for flags in seen) or backend == "vmap"
    assert x.grad is None
    encoded.sum().backward()  # its graph is still there
    assert torch.equal(x.grad, plain)  # type: ignore[arg-type]


def test_encoded_inputs_may_be_changed_in_place(backend: str, per_sample_truth: Any) -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)).double()
    encoded = torch.randn(4, 5).double() @ torch.randn(5, 3).double().requires_grad_()
    before = encoded.detach().clone()

    def loss_fn(outputs: Tensor, _: None) -> Tensor:
        return outputs.square().sum(1)

    truth = per_sample_truth(model, loss_fn, before.clone(), None)
    found = persample.make_source(backend, model, loss_fn).per_sample(encoded, None)
    torch.testing.assert_close(found, truth.gradients)
    assert torch.equal(encoded, before)


@pytest.mark.parametrize("check", ["first", "never"])
def test_batches_that_differ_by_it_are_of_two_kinds(check: Any) -> None:
    """What is refused for one is refused for the other, too, whichever came first."""
    source = persample.make_source("loop", Field(), lambda outputs, _: residual(outputs[1], outputs[0]), check=check)
    x = torch.randn(4, 2).double()
    source.moments(x.requires_grad_(), None)
    with pytest.raises(RuntimeError, match="does not require grad"):  # as PyTorch says without this package
        source.moments(x.detach(), None)
