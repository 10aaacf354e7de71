"""The suite finds what it looks for: wrong numbers, refusals of what was promised, traces on the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import persample
from persample.errors import UnsupportedModelError
from persample.sources import registry
from persample.sources.hooks import HooksSource
from persample.sources.loop import LoopSource

from . import backend_promises
from .case import Method, assert_right_or_refused
from .trace import no_trace
from .zoo import ZOO


class PrintedFormula(HooksSource):
    """Squares before the sum over the positions of a convolution."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any, Any], Any], *, check: Any = "first") -> None:
        super().__init__(model, loss_fn, curvature="printed", check=check)


class Scaled(LoopSource):
    """Off by the batch size."""

    def compute_per_sample(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        losses, gradients = super().compute_per_sample(batch)
        return losses, {name: g / batch.size for name, g in gradients.items()}


class SlightlyOff(LoopSource):
    """Off by less than the self-check can see, and by more than rounding explains."""

    def compute_moments(self, batch: Any) -> Any:
        moments = super().compute_moments(batch)
        return dataclasses.replace(moments, mean={n: g * (1 + 3e-8) for n, g in moments.mean.items()})


class OtherOrder(LoopSource):
    """Right numbers in another order."""

    def compute_per_sample(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        losses, gradients = super().compute_per_sample(batch)
        return losses, dict(reversed(gradients.items()))


class Refusing(LoopSource):
    """Serves nothing."""

    def refuse_unsupported(self) -> None:
        raise UnsupportedModelError("Not today.")


class Drawing(LoopSource):
    """Draws random numbers for itself."""

    def compute_moments(self, batch: Any) -> Any:
        torch.rand(1)
        return super().compute_moments(batch)


@pytest.mark.parametrize(
    ("source", "name", "method", "check"),
    [
        (PrintedFormula, "Conv2d", "moments", "first"),
        (PrintedFormula, "Linear on a sequence", "moments", "first"),
        (Scaled, "MLP", "per_sample", "never"),
        (Scaled, "MLP", "per_sample", "first"),
        (SlightlyOff, "MLP", "moments", "first"),
        (OtherOrder, "MLP", "per_sample", "first"),
        (Refusing, "MLP", "moments", "first"),
        (Drawing, "MLP", "moments", "first"),
    ],
)
def test_finds_what_is_wrong(
    source: type, name: str, method: Method, check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_load", lambda backend: source)
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    promises = backend_promises._PROMISES | {"own": backend_promises.Promise(serves=backend_promises.LISTED)}
    monkeypatch.setattr(backend_promises, "_PROMISES", promises)
    persample.register_backend("own", "own:Source")
    with pytest.raises(AssertionError):
        assert_right_or_refused("own", ZOO[name].case(3), method, check)


def test_every_feature_of_the_zoo_is_promised_by_the_oracle() -> None:
    for name, entry in ZOO.items():
        assert entry.features <= backend_promises.EVERYTHING, name


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
