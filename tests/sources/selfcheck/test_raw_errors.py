"""No raw error of PyTorch's leaves a backend on a model that runs; errors of the user's own stay what they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import persample
from persample.errors import NonFiniteLossError, UnsupportedModelError
from persample.sources.backends.fused import rule_table
from persample.sources.batch import Batch
from persample.testing.zoo.case import Net, parameter

METHODS = ("moments", "per_sample")


def loss_fn(outputs: Tensor, targets: Any = None) -> Tensor:
    return outputs.reshape(len(outputs), -1).sin().sum(1)


class OnlyInLargeBatches(persample.PerSampleGradSource):
    """A backend that calls a part of the model with what does not fit."""

    def compute_per_sample(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        self.model.get_submodule("inner.0")(torch.zeros(2, 5, dtype=torch.float64))
        raise AssertionError("unreachable")


def small(function: Any = None) -> Any:
    return Net(function or (lambda m, x: m.inner(x)), inner=nn.Sequential(nn.Linear(3, 4), nn.Tanh())).double()


X = torch.linspace(-1, 1, 12).double().view(4, 3)


@pytest.mark.parametrize("method", METHODS)
def test_a_failure_of_the_backend_names_operation_and_module(method: str) -> None:
    with pytest.raises(UnsupportedModelError) as refusal:
        getattr(OnlyInLargeBatches(small(), loss_fn), method)(X, None)
    for said in ("OnlyInLargeBatches", "Linear 'inner.0'", "shapes cannot be multiplied", "'loop'"):
        assert said in str(refusal.value)
    assert type(refusal.value.__cause__) is RuntimeError


@pytest.mark.parametrize("method", METHODS)
def test_a_rule_that_fails_names_the_parameter(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(capture: Any, input: Tensor, other: Tensor) -> Tensor:
        result = torch.hypot(input, capture.value(other))
        return capture.tap(result, capture.layout(input, "hypot"), [(other, lambda delta: delta.view(-1, 5))])

    monkeypatch.setitem(rule_table.RULES, torch.hypot, mistaken)  # type: ignore[arg-type]
    model = Net(lambda m, x: torch.hypot(x, m.scale), scale=parameter(3)).double()
    source = persample.make_source("fused", model, loss_fn)
    with pytest.raises(UnsupportedModelError, match=r"'scale'.*invalid for input of size") as refusal:
        getattr(source, method)(X, None)
    assert "'loop'" in str(refusal.value)
    with pytest.raises(UnsupportedModelError, match="'scale'"), source.recording("sum"):
        loss_fn(model(X)).sum().backward()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", ["model", "loss"])
def test_a_wrong_call_shows_the_error_of_pytorch(backend: str, where: str, method: str) -> None:
    model = small((lambda m, x: m.inner(x) @ x.T) if where == "model" else None)
    loss = (lambda outputs, targets: outputs.view(5, -1).sum(1)) if where == "loss" else loss_fn
    message = "shapes cannot be multiplied" if where == "model" else "is invalid for input of size"
    with pytest.raises(RuntimeError, match=message) as found:
        getattr(persample.make_source(backend, model, loss), method)(X, None)
    assert type(found.value) is RuntimeError


class _Backwards(torch.autograd.Function):
    """Insists on something in its backward pass, as reversible layers do on the training mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Tensor:
        raise AssertionError("use model.train()")


def changed_in_place(m: Any, x: Tensor) -> Tensor:
    h = m.inner(x)
    first = h.sin()
    h.mul_(2)
    return first


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("function", [lambda m, x: _Backwards.apply(m.inner(x)), changed_in_place])
def test_a_backward_pass_that_fails_is_refused_in_words(backend: str, function: Any, method: str) -> None:
    with pytest.raises(UnsupportedModelError) as refusal:
        getattr(persample.make_source(backend, small(function), loss_fn), method)(X, None)
    if backend in ("loop", "fused"):
        assert "backward pass fails in ordinary PyTorch, too" in str(refusal.value)


@pytest.mark.parametrize("check", ["first", "never"])
@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_not_finite_is_the_true_reason(backend: str, method: str, check: Any) -> None:
    """Backend 'fused' cannot follow the samples through such numbers, where it has to try an operation out."""
    model = small(lambda m, x: m.outer(torch.einsum("bi,bj->bij", h := m.inner(x) / 0 * 0, h).sum(2)))
    model.outer = nn.Linear(4, 2).double()
    with pytest.raises(NonFiniteLossError):
        getattr(persample.make_source(backend, model, loss_fn, check=check), method)(X, None)
