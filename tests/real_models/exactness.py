"""The comparison that all tests of real models make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import persample


def assert_exact(
    backend: str,
    model: nn.Module,
    loss_fn: Callable[..., Any],
    inputs: Any,
    truth: Any,
    no_trace: Callable[..., Any],
    *,
    rounding: float = 1e-10,
    check: str = "never",
) -> None:
    """Compare rows and moments with the truth; each is computed from the same seed, and leaves no trace.

    What an ordinary forward pass leaves in attributes of the model is state, which is there before.
    """
    source = persample.make_source(backend, model, loss_fn, check=check)
    model(**inputs) if isinstance(inputs, dict) else model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    with no_trace(model, inputs):
        torch.manual_seed(0)
        found = source.per_sample(inputs, None)
        torch.manual_seed(0)
        moments = source.moments(inputs, None)
    rows = truth.gradients
    assert list(found) == list(moments.mean) == list(moments.second_moment) == list(rows)
    rtol, atol = 10 * rounding, rounding * max(g.abs().max().item() for g in rows.values())
    torch.testing.assert_close(moments.losses, truth.losses, rtol=rtol, atol=rounding)
    for name, g in rows.items():
        torch.testing.assert_close(found[name], g, rtol=rtol, atol=atol)
        torch.testing.assert_close(moments.mean[name], g.mean(0), rtol=rtol, atol=atol)
        # Compared as root mean squares, in the unit of the gradients, where the tolerance has a meaning.
        root = g.square().mean(0).sqrt()
        torch.testing.assert_close(moments.second_moment[name].sqrt(), root, rtol=rtol, atol=atol)
