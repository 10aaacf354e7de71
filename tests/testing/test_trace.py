"""No trace on a model goes unseen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from persample.testing import no_trace


def _model() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].weight.grad = torch.ones(2, 2)
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model[0].weight.data.add_(1e-7),
        lambda model: model[0].weight.grad.zero_(),
        lambda model: setattr(model[0].weight, "grad", None),
        lambda model: setattr(model[0].bias, "grad", torch.zeros(2)),
        lambda model: setattr(model[0].weight, "grad", model[0].weight.grad.clone()),
        lambda model: setattr(model[0].weight, "note", 1),
        lambda model: model[0].weight.requires_grad_(False),
        lambda model: model[0].weight.register_hook(lambda g: None),
        lambda model: model[0].weight.register_post_accumulate_grad_hook(lambda p: None),
        lambda model: setattr(model[0], "weight", nn.Parameter(model[0].weight.data)),
        lambda model: model[0]._parameters.__setitem__("weight", model[0]._parameters.pop("weight")),
        lambda model: model[0].register_forward_hook(lambda *args: None),
        lambda model: model[0].register_full_backward_hook(lambda *args: None),
        lambda model: setattr(model[0], "note", 1),
        lambda model: model[1].eval(),
        lambda model: model[1].running_mean.add_(1),
        lambda model: setattr(model[1], "running_mean", model[1].running_mean.clone()),
        lambda model: model.append(nn.ReLU()),
        lambda model: setattr(model[0], "__class__", nn.modules.linear.NonDynamicallyQuantizableLinear),
        lambda model: torch.set_grad_enabled(False),
    ],
)
def test_finds_every_trace(change: Callable[[nn.Sequential], Any]) -> None:
    model = _model()
    with pytest.raises(AssertionError), torch.enable_grad(), no_trace(model):
        change(model)


def test_finds_changed_inputs() -> None:
    model, inputs = _model(), torch.zeros(3, 2)
    with pytest.raises(AssertionError), no_trace(model, {"x": (inputs,)}):
        inputs += 1


def test_finds_no_trace_where_there_is_none() -> None:
    model, inputs = _model().eval(), torch.zeros(3, 2)
    with no_trace(model, inputs):
        model(inputs)
