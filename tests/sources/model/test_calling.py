"""Models that take something else than they are given, and that return something else than a tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributions, nn

import persample
from persample import losses
from persample.errors import BatchError, LossError


@dataclass
class Output:
    """As the outputs of transformers."""

    logits: Tensor
    loss: Tensor | None = None


class Model(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4).double()
        self.function = function

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        outputs = self.function(self.inner(x))
        if labels is not None:
            outputs.loss = F.cross_entropy(outputs.logits, labels)
        return outputs


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(5, 3).double(), torch.randint(4, (5,))


def normal(z: Tensor) -> distributions.Distribution:
    return distributions.Independent(distributions.Normal(z[:, :2], z[:, 2:].exp()), 1)


def mixture(z: Tensor) -> distributions.Distribution:
    return distributions.MixtureSameFamily(distributions.Categorical(logits=z), distributions.Normal(z, 1.0))


def log_loss(outputs: Any, targets: Tensor) -> Tensor:
    return -outputs.log_prob(targets)


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "categorical": (lambda z: distributions.Categorical(logits=z), log_loss, lambda y: y),
    "independent normals": (normal, log_loss, lambda y: torch.stack([y, y.square()], 1).double()),
    "mixture": (mixture, log_loss, lambda y: y.double()),
    "dataclass": (Output, lambda o, t: F.cross_entropy(o.logits, t, reduction="none"), lambda y: y),
    "dict": (lambda z: {"logits": z}, lambda o, t: F.cross_entropy(o["logits"], t, reduction="none"), lambda y: y),
}


@pytest.mark.parametrize("way", ["source", "block"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_that_are_no_tensors(backend: str, name: str, way: str, batch: tuple[Tensor, Tensor]) -> None:
    function, loss, targets_of = OUTPUTS[name]
    (x, y), model = batch, Model(function)
    targets, params = targets_of(y), list(model.parameters())
    rows = [torch.autograd.grad(loss(model(x[i : i + 1]), targets[i : i + 1]).sum(), params) for i in range(5)]
    source = persample.make_source(backend, model, loss)
    if way == "source":
        moments = source.moments(x, targets)
    else:
        with source.recording() as recorded:
            loss(model(x), targets).mean().backward()
        moments = recorded.moments()
    for second_moment, row in zip(moments.second_moment.values(), zip(*rows, strict=True), strict=True):
        torch.testing.assert_close(second_moment, torch.stack(row).square().mean(0))


@pytest.mark.parametrize(
    ("function", "loss", "said"),
    [
        (Output, losses.cross_entropy, "type Output and .*loss\\(outputs.logits, targets\\)"),
        (Output, nn.CrossEntropyLoss(), "type Output and .*loss\\(outputs.logits, targets\\)"),
        (Output, losses.gaussian, "type Output and .*loss\\(outputs.logits, targets\\)"),
        (lambda z: {"scores": z}, losses.cross_entropy, "type dict .*loss\\(outputs\\['scores'\\], targets\\)"),
        (lambda z: (z, None), losses.cross_entropy, "type tuple .*loss\\(outputs\\[0\\], targets\\)"),
    ],
)
def test_losses_say_how_to_take_the_tensor_out(
    backend: str, function: Any, loss: Any, said: str, batch: tuple[Tensor, Tensor]
) -> None:
    with pytest.raises(LossError, match=rf"(?s){said}"):
        persample.make_source(backend, Model(function), loss).moments(*batch)


def test_the_loss_that_the_model_computed_is_refused(backend: str, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    source = persample.make_source(backend, Model(Output), lambda outputs, targets: outputs.loss)
    with pytest.raises(LossError, match=r"the model itself computed.*leave the labels out of the inputs"):
        source.moments({"x": x, "labels": y}, None)


def test_a_type_error_of_the_loss_passes_on(backend: str, batch: tuple[Tensor, Tensor]) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        raise TypeError("my own")

    with pytest.raises(TypeError, match=r"^my own$"):
        persample.make_source(backend, nn.Linear(3, 4).double(), loss).moments(*batch)


class OneArgument(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4).double()

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


@pytest.mark.parametrize(
    ("arrange", "said"),
    [
        (lambda x: (x, x), "its only argument, of type tuple"),
        (lambda x: {"y": x}, "its only argument, of type dict"),
        (lambda x: ({"y": x},), "its only argument, of type dict"),
        (lambda x: {"x": x, "y": x}, "its only argument, of type dict"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    backend: str, arrange: Any, said: str, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    with pytest.raises(BatchError, match=rf"{said} \(.*a dict as keyword arguments; \(it,\) passes"):
        persample.make_source(backend, OneArgument(), losses.cross_entropy).moments(arrange(x), y)


def test_a_missing_argument_is_named(backend: str, batch: tuple[Tensor, Tensor]) -> None:
    class Two(OneArgument):
        def forward(self, x: Tensor, other: Tensor) -> Any:
            return self.inner(x * other)

    x, y = batch
    with pytest.raises(BatchError, match=r"with the inputs .*missing 1 required positional argument: 'other'"):
        persample.make_source(backend, Two(), losses.cross_entropy).moments(x, y)


def test_a_type_error_of_the_model_passes_on(backend: str, batch: tuple[Tensor, Tensor]) -> None:
    class Broken(OneArgument):
        def forward(self, x: Tensor, flag: bool = True) -> Any:
            raise TypeError("my own")

    x, y = batch
    for inputs in (x, (x,), {"x": x, "flag": False}):
        with pytest.raises(TypeError, match=r"^my own$"):
            persample.make_source(backend, Broken(), losses.cross_entropy).moments(inputs, y)


def test_hooks_may_change_the_arguments(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    model = OneArgument()
    expected = persample.make_source("loop", model, losses.cross_entropy).moments(2 * x, y)
    model.register_forward_pre_hook(lambda module, args: (args[0] + args[1],))
    found = persample.make_source("loop", model, losses.cross_entropy).moments((x, x), y)
    torch.testing.assert_close(dict(found.mean), dict(expected.mean))
