"""What VOGN refuses and what it warns of."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from persample.errors import OptionError
from persample.losses import cross_entropy
from persample.vogn import VOGN, DangerousFirstStepWarning, MeanFieldVI, Vadam

Make = Callable[..., VOGN]
Train = Callable[..., None]
NAN, INFINITY = float("nan"), float("inf")

OUT_OF_RANGE = [
    *(("lr", value) for value in (-1e-9, NAN, INFINITY, "0.1", None, torch.tensor(0.1))),
    *(("prior_precision", value) for value in (-1.0, NAN, INFINITY, "1")),
    *(("decay", value) for value in (-0.1, 1.1, NAN, None)),
    *(("hess_init", value) for value in (-0.1, NAN, INFINITY, None)),
    *(("momentum", value) for value in (-0.1, 1.0, NAN, None)),
    *(("order", value) for value in ("new", None, 1)),
    *(("prior_mean", value) for value in (NAN, INFINITY, "1")),
    *(("damping", value) for value in (-0.1, NAN)),
    *(("temperature", value) for value in (0.0, -1.0, INFINITY)),
    *(("temperature_start", value) for value in (0.0, -1.0)),
    *(("temperature_steps", value) for value in (-1, 0.5)),
    *(("max_update", value) for value in (0.0, -1.0, NAN)),
    *(("bias_correction", value) for value in (None, 1)),
    *(("average_prior", value) for value in (None, "no")),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_settings_out_of_range_are_refused_everywhere(name: str, value: Any, model: nn.Module, make_vogn: Make) -> None:
    message = re.escape(f"{name}={value!r} must be ")
    with pytest.raises(OptionError, match=message):
        make_vogn(model, **{name: value})
    with pytest.raises(OptionError, match=message):
        make_vogn(model, params=[{"params": model[0].parameters(), name: value}])


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_settings_that_leave_their_range_are_refused_at_the_step(
    name: str, value: Any, model: nn.Module, vogn: VOGN, batch: tuple[Tensor, Tensor]
) -> None:
    vogn.observe(*batch)
    before = model[0].weight.detach().clone()
    vogn.param_groups[0][name] = value
    with pytest.raises(OptionError, match=name):
        vogn.step()
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("name", ["data_size", "mc_samples"])
@pytest.mark.parametrize("value", [0, -1, 1.5, NAN, None, "10"])
def test_counts_must_be_whole_and_positive(name: str, value: Any, model: nn.Module, make_vogn: Make) -> None:
    with pytest.raises(OptionError, match=f"{name}=.*whole number >= 1"):
        make_vogn(model, **{name: value})


@pytest.mark.parametrize(("name", "value"), [("augmentation", 0.0), ("augmentation", -1), ("max_grad_norm", 0.0)])
def test_numbers_must_be_positive(name: str, value: Any, model: nn.Module, make_vogn: Make) -> None:
    with pytest.raises(OptionError, match=f"{name}=.*number > 0"):
        make_vogn(model, **{name: value})


@pytest.mark.parametrize("rule", [Vadam, MeanFieldVI])
@pytest.mark.parametrize(
    ("name", "value"), [("betas", (0.9, 1.0)), ("betas", (0.9,)), ("lr", -1.0), ("temperature", 0.0)]
)
def test_the_siblings_check_their_settings(rule: Any, name: str, value: Any, model: nn.Module) -> None:
    with pytest.raises(OptionError, match=f"{name}=.*must be"):
        rule(model, cross_entropy, data_size=10, **{name: value})


@pytest.mark.parametrize(("name", "value"), [("eps", -1.0), ("scale_init", 0.0)])
def test_mean_field_checks_its_own(name: str, value: Any, model: nn.Module) -> None:
    with pytest.raises(OptionError, match=f"{name}=.*must be"):
        MeanFieldVI(model, cross_entropy, data_size=10, **{name: value})


def test_a_posterior_without_precision_is_refused(model: nn.Module, make_vogn: Make) -> None:
    with pytest.raises(OptionError, match="hess_init=0 and prior_precision=0"):
        make_vogn(model, hess_init=0, prior_precision=0)


def test_a_posterior_that_loses_its_precision_is_refused(make_vogn: Make, train: Train) -> None:
    """Without a prior, and without memory, an unused parameter has no precision after one step."""
    model = nn.Linear(3, 2).double()
    model.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    vogn = make_vogn(model, prior_precision=0.0, decay=0.0)
    train(vogn, steps=1)
    with pytest.raises(OptionError, match="'unused'"):
        train(vogn, steps=1)
    assert torch.equal(model.unused, torch.ones(2, dtype=torch.float64))


class TestParameters:
    def test_of_another_model_are_refused(self, model: nn.Module, make_vogn: Make) -> None:
        with pytest.raises(OptionError, match=r"shape \(7, 5\).*not a parameter"):
            make_vogn(model, params=nn.Linear(5, 7).parameters())

    def test_things_that_are_no_tensors_are_refused(self, model: nn.Module, make_vogn: Make) -> None:
        with pytest.raises(OptionError, match=r"'0\.weight'.*not a parameter"):
            make_vogn(model, params=["0.weight"])

    def test_frozen_ones_are_refused_by_name(self, model: nn.Module, make_vogn: Make) -> None:
        model[2].bias.requires_grad_(False)
        with pytest.raises(OptionError, match=r"'2\.bias'.*frozen"):
            make_vogn(model, params=model.parameters())

    def test_given_twice_are_refused_by_name(self, model: nn.Module, make_vogn: Make) -> None:
        with pytest.raises(OptionError, match=r"'0\.bias' twice"):
            make_vogn(model, params=[*model.parameters(), model[0].bias])
        groups = [{"params": model.parameters()}, {"params": [model[0].bias]}]
        with pytest.raises(OptionError, match=r"'0\.bias' twice"):
            make_vogn(model, params=groups)

    def test_none_at_all_is_refused(self, model: nn.Module, make_vogn: Make) -> None:
        with pytest.raises(OptionError, match="nothing to train"):
            make_vogn(model, params=[])
        with pytest.raises(OptionError, match="nothing to train"):
            make_vogn(model.requires_grad_(False))

    def test_pairs_of_name_and_parameter_are_accepted(self, model: nn.Module, make_vogn: Make, train: Train) -> None:
        vogn = make_vogn(model, params=model.named_parameters())
        train(vogn)
        assert vogn.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]


DANGEROUS = {"lr": 0.1, "hess_init": 0.05, "prior_precision": 5.0, "data_size": 100}  # 0.1 / (0.05 + 0.05) = 1


class TestFirstStepWarning:
    def test_names_the_numbers_and_the_line_and_comes_once(
        self, model: nn.Module, make_vogn: Make, batch: tuple[Tensor, Tensor]
    ) -> None:
        vogn = make_vogn(model, **DANGEROUS)
        vogn.observe(*batch)
        with pytest.warns(
            DangerousFirstStepWarning,
            match=r"0\.1 / \(0\.05 \+ 5 / 100\) = 1 .*hess_init to at least 0\.15.*lr to at most 0\.05",
        ) as caught:
            vogn.step()
        assert [warning.filename for warning in caught] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            vogn.observe(*batch)
            vogn.step()

    def test_names_damping_and_temperature(self, model: nn.Module, make_vogn: Make, train: Train) -> None:
        settings = {"damping": 0.01, "temperature": 0.2, "lr": 0.1, "hess_init": 0.05, "prior_precision": 5.0}
        formula = "(hess_init + damping + 0.2 * prior_precision / data_size) = 0.1 / (0.05 + 0.01 + 0.2 * 5 / 100)"
        with pytest.warns(DangerousFirstStepWarning, match=re.escape(formula)):
            train(make_vogn(model, **settings), steps=1)

    @pytest.mark.parametrize("advice", [{"hess_init": 0.15}, {"lr": 0.05}])
    def test_following_it_is_enough(
        self, advice: dict[str, float], model: nn.Module, make_vogn: Make, train: Train
    ) -> None:
        vogn = make_vogn(model, **(DANGEROUS | advice))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(vogn)

    def test_as_an_error_it_stops_the_step(
        self, model: nn.Module, make_vogn: Make, batch: tuple[Tensor, Tensor]
    ) -> None:
        vogn = make_vogn(model, **DANGEROUS)
        before = model[0].weight.detach().clone()
        vogn.observe(*batch)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(DangerousFirstStepWarning):
                vogn.step()
        assert torch.equal(model[0].weight, before)
        vogn.param_groups[0]["lr"] = 0.01
        vogn.step()

    def test_the_printed_initial_value_is_dangerous_for_ordinary_settings(
        self, model: nn.Module, make_vogn: Make, train: Train
    ) -> None:
        vogn = make_vogn(model, hess_init=0.0, lr=1e-3, prior_precision=1.0, data_size=60_000)
        with pytest.warns(DangerousFirstStepWarning, match="= 60 gradients"):
            train(vogn, steps=1)

    def test_the_defaults_are_safe(self, batch: tuple[Tensor, Tensor], model: nn.Module, train: Train) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(VOGN(model, cross_entropy, data_size=60_000, backend="loop"))
