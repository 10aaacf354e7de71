"""Arguments of the optimizers that make no sense are errors of the package, which name them; for every rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from persample.errors import OptionError, PersampleError
from persample.losses import cross_entropy
from persample.vogn import OGN, VOGN, Vadam

from .ways import RULES, Batch, by_observing, make, network

MODEL = network()
PARAMS = list(MODEL.parameters())


@pytest.mark.parametrize(
    ("argument", "match"),
    [
        ({"generator": 5}, r"generator=5 must be a torch\.Generator"),
        ({"data_size": 0}, "data_size=0"),
        ({"data_size": "60000"}, "data_size='60000'"),
        ({"augmentation": None}, "augmentation=None"),
        ({"mc_samples": 1.5}, r"mc_samples=1\.5"),
        ({"max_grad_norm": -1.0}, r"max_grad_norm=-1\.0"),
        ({"loss_reduction": ["mean"]}, r"loss_reduction=\['mean'\]"),
        ({"prior": 1.0}, "prior is of type float.*prior_precision"),
        ({"prior_mean": dict.fromkeys(("0.weight", "0.bias"), 0.0)}, r"prior_mean\['0\.weight'\] is of type float"),
        ({"lr": torch.tensor(0.1)}, "lr=tensor"),
        ({"params": 5}, "params is of type int"),
        ({"params": PARAMS[0]}, "params is of type Parameter: pass a list"),
        ({"params": "0.weight"}, "params is of type str"),
        ({"params": {"params": PARAMS}}, "params is of type dict"),
        ({"params": set(PARAMS)}, "params is a set"),
        ({"params": []}, "nothing to train"),
        ({"params": [{"params": PARAMS[:1]}, PARAMS[1]]}, "both parameters and groups"),
        ({"params": [{"lr": 0.1}]}, 'entry "params"'),
        ({"params": [{"params": []}]}, "is empty"),
        ({"params": [{"params": 5}]}, "is of type int"),
        ({"params": [{"params": set(PARAMS)}]}, "is a set"),
        ({"params": ["0.weight"]}, "'0.weight', which is not a parameter"),
        ({"params": [{"params": PARAMS, "weight_decay": 0.1}]}, "'weight_decay'.*prior_precision = w"),
        ({"params": [{"params": PARAMS, "mc_samples": 2}]}, "'mc_samples', which applies to the whole optimizer"),
        ({"params": [{"params": PARAMS, "learning_rate": 0.1}]}, "'learning_rate', which is not known: there are .*lr"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rule", RULES)
def test_are_refused(rule: Any, argument: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        rule(MODEL, cross_entropy, **{"data_size": 10, **argument})


@pytest.mark.parametrize("argument", [{"backend_options": 5}, {"backend": 5}, {"backend": None}, {"order": []}])
@pytest.mark.parametrize("rule", [VOGN, OGN])
def test_those_of_some_rules(rule: Any, argument: dict[str, Any]) -> None:
    with pytest.raises(PersampleError):
        rule(MODEL, cross_entropy, data_size=10, **argument)


@pytest.mark.parametrize("betas", [0.9, (0.9,), "no", (0.9, 1.0), None])
def test_betas(betas: Any) -> None:
    with pytest.raises(OptionError, match="betas="):
        Vadam(MODEL, cross_entropy, data_size=10, betas=betas)


@pytest.mark.parametrize("rule", RULES)
def test_groups_may_have_what_loggers_and_schedulers_put_there(rule: Any, batch: Batch) -> None:
    model = network()
    group = {"params": list(model[0].named_parameters()), "name": "backbone", "initial_lr": 0.1, "lr": 0.02}
    optimizer = make(rule, model=model, params=[group])
    assert optimizer.param_groups[0]["name"] == "backbone"
    by_observing(optimizer, *batch)
    again = make(rule, model=model, params=optimizer.param_groups)  # as they are in another optimizer
    assert again.param_groups[0]["lr"] == 0.02


def test_a_posterior_is_a_prior(batch: Batch) -> None:
    first = make()
    by_observing(first, *batch)
    second = make(model=first.model, prior=first.posterior)
    assert torch.equal(second.prior.precision["0.weight"], first.posterior.precision["0.weight"])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda o, x, y: o.step(5), "closure=5 must be a function"),
        (lambda o, x, y: o.sampled_params(generator=5).__enter__(), "generator=5"),
        (lambda o, x, y: o.sampled_params(train=True, grad_scaler=5).__enter__(), "grad_scaler=5"),
        (lambda o, x, y: o.predict(x, generator=5), "generator=5"),
        (lambda o, x, y: o.posterior.sample(generator=5), "generator=5"),
        (lambda o, x, y: o.add_param_group([1]), "must be a dict"),
        (lambda o, x, y: (setattr(o, "mc_samples", 0), o.observe(x, y)), "mc_samples=0"),
        (lambda o, x, y: (setattr(o, "data_size", -3), o.observe(x, y)), "data_size=-3"),
        (lambda o, x, y: (o.observe(x, y), setattr(o, "max_grad_norm", 0), o.step()), "max_grad_norm=0"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rule", RULES)
def test_of_calls_too(rule: Any, call: Callable[..., Any], match: str, batch: Batch) -> None:
    optimizer = make(rule)
    with pytest.raises(OptionError, match=match):
        call(optimizer, *batch)
    assert not optimizer._lending.out


def test_a_wrong_grad_scaler_is_noticed_before_the_pass(batch: Batch) -> None:
    optimizer, called = make(), []
    with pytest.raises(OptionError, match="grad_scaler"), optimizer.sampled_params(train=True, grad_scaler="scaler"):
        called.append(F.cross_entropy(optimizer.model(batch[0]), batch[1]))
    assert not called


def test_a_model_without_parameters_has_nothing_to_train() -> None:
    with pytest.raises(OptionError, match="nothing to train"):
        VOGN(nn.Tanh(), cross_entropy, data_size=10)


@pytest.mark.parametrize("rule", RULES)
def test_an_unknown_argument_is_named_with_those_that_there_are(rule: Any) -> None:
    with pytest.raises(TypeError, match=rf"{rule.__name__}\(\) has no argument 'learning_rate': .*lr.*data_size"):
        rule(network(), data_size=10, learning_rate=0.1)


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({}, r"\(\) needs data_size=…, the number of training samples"),
        ({"ess": 5}, "'ess': the effective sample size is data_size / temperature"),
        ({"weight_decay": 1e-4, "data_size": 5}, r"'weight_decay': a weight decay of w is prior_precision = w \* data"),
    ],
)
@pytest.mark.parametrize("rule", RULES)
def test_arguments_of_other_optimizers_have_a_translation(rule: Any, settings: dict[str, Any], hint: str) -> None:
    with pytest.raises(TypeError, match=hint):
        rule(nn.Linear(2, 2), **settings)
