"""What the tests of single backends assert: the numbers of the loop and no trace, or a refusal and no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import persample
from persample.errors import UnsupportedModelError
from persample.testing import no_trace as no_trace

Loss = Callable[[Any, Any], Tensor]


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().flatten(1).sum(1)


def targets_for(model: nn.Module, inputs: Any) -> Tensor:
    """Random targets of the shape of the outputs; the model is called once."""
    with torch.no_grad(), torch.random.fork_rng():
        if isinstance(inputs, dict):
            outputs = model(**inputs)
        else:
            outputs = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
        return torch.randn_like(outputs)


def assert_served(backend: str, model: nn.Module, inputs: Any, loss_fn: Loss = squared_error, seed: int = 0) -> None:
    """Assert that both methods give the loop's numbers to 1e-9 without the self-check, and leave nothing behind."""
    targets = targets_for(model, inputs)
    for method in ("moments", "per_sample"):
        torch.manual_seed(seed)
        expected = getattr(persample.make_source("loop", model, loss_fn), method)(inputs, targets)
        stream = torch.get_rng_state()
        torch.manual_seed(seed)
        with no_trace(model, inputs, targets):
            result = getattr(persample.make_source(backend, model, loss_fn, check="never"), method)(inputs, targets)
        assert torch.equal(torch.get_rng_state(), stream)
        if method == "moments":
            torch.testing.assert_close(result.losses, expected.losses, rtol=1e-12, atol=0)
            assert_close(result.mean, expected.mean)
            assert_close(result.second_moment, expected.second_moment)
        else:
            assert_close(result, expected)


def assert_close(actual: Any, expected: Any) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(
            actual[name], value, rtol=1e-9, atol=1e-10 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_refused(backend: str, model: nn.Module, inputs: Any, match: str, loss_fn: Loss = squared_error) -> None:
    """Assert that both methods refuse, even without the self-check, in words that match, and leave nothing behind."""
    targets = targets_for(model, inputs)
    for method in ("moments", "per_sample"):
        source = persample.make_source(backend, model, loss_fn, check="never")
        with no_trace(model, inputs, targets), pytest.raises(UnsupportedModelError, match=match) as refusal:
            getattr(source, method)(inputs, targets)
        assert "'vjp'" in str(refusal.value), "it says what to do"
