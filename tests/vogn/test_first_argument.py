"""A model, or its parameters, as the first argument of the optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persample import losses
from persample.errors import OptionError
from persample.testing.devices import generator_of
from persample.vogn import VOGN

from .ways import RULES, network

Batch = tuple[Tensor, Tensor]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("parameters", ["parameters", "named_parameters"])
def test_parameters_stand_for_their_model(rule: Any, parameters: str, batch: Batch) -> None:
    models = network(), network()
    first = models[0], getattr(models[1], parameters)()
    for argument in first:
        optimizer = rule(argument, losses.cross_entropy, data_size=100, lr=0.01, generator=generator_of(2))
        optimizer.observe(*batch)
        optimizer.step()
        with optimizer.sampled_params(train=True):
            F.cross_entropy(optimizer.model(batch[0]), batch[1]).backward()
        optimizer.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)


def test_frozen_ones_are_left_out_as_of_a_model() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    optimizer = VOGN(model.named_parameters(), data_size=10)
    assert list(optimizer.posterior.mean) == ["0.bias", "2.weight", "2.bias"]


def test_those_of_a_part_train_the_part() -> None:
    model = network()
    assert VOGN(model[2].parameters(), data_size=10).model is model[2]


@pytest.mark.parametrize(
    "first",
    [
        lambda m: list(m.parameters()),
        lambda m: [{"params": m.parameters()}],
        lambda m: (p for p in m.parameters()),
        lambda m: dict(m.named_parameters()),
    ],
)
def test_what_does_not_tell_the_model_is_refused(first: Any) -> None:
    with pytest.raises(OptionError, match=r"does not say which model.*model\.named_parameters\(\) itself"):
        VOGN(first(network()), data_size=10)


def test_a_generator_that_was_begun_is_refused() -> None:
    begun = network().parameters()
    next(begun)
    with pytest.raises(OptionError, match="does not say which model"):
        VOGN(begun, data_size=10)


@pytest.mark.parametrize("first", [lambda m: m.modules(), lambda m: m.named_modules()])
def test_what_is_no_parameter_is_refused(first: Any) -> None:
    with pytest.raises(OptionError, match=r"something else than parameters: pass the model"):
        VOGN(first(network()), data_size=10)


def test_params_beside_parameters_are_refused() -> None:
    model = network()
    with pytest.raises(OptionError, match="both name parameters"):
        VOGN(model.parameters(), data_size=10, params=[model[0].weight])


def test_two_rules_of_a_model_with_own_parameters_method() -> None:
    class Listed(nn.Linear):
        def parameters(self, recurse: bool = True) -> Any:
            yield from super().parameters(recurse)

    model = Listed(3, 2)
    assert VOGN(model.parameters(), data_size=10).model is model
