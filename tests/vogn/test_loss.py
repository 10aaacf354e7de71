"""An optimizer without a loss, and a loss with parameters of its own, for every rule."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persample import backends, losses
from persample.errors import OptionError, UsageError
from persample.testing.devices import generator_of
from persample.vogn import IVON, OGN, VOGN, MeanFieldVI, UntrainedLossWarning, Vadam

from .ways import PLAIN, RECORDING, RULES, RULES_AND_BACKENDS, Batch, by_closure, by_context, make, network


def without_loss(rule: Any, backend: str = "fused") -> Any:
    settings = {"backend": backend, "hess_init": 0.5, **PLAIN} if issubclass(rule, VOGN) else {}
    if settings and (problem := backends()[backend].problem):
        pytest.skip(problem)
    return rule(
        network(),
        data_size=100,
        lr=0.01,
        generator=generator_of(2),
        **settings,
    )


class TestWithoutALoss:
    @pytest.mark.parametrize(("rule", "backend"), RULES_AND_BACKENDS)
    @pytest.mark.parametrize("way", [by_context, by_closure])
    def test_passes_of_ones_own_need_none(self, rule: Any, backend: str, way: Callable[..., Any], batch: Batch) -> None:
        optimizer, due = without_loss(rule, backend), make(rule, backend)
        way(optimizer, *batch)
        way(due, *batch)
        assert torch.equal(optimizer.model[0].weight, due.model[0].weight)
        optimizer.predict(batch[0], samples=2)

    @pytest.mark.parametrize("rule", RULES)
    def test_what_needs_one_says_so(self, rule: Any, batch: Batch) -> None:
        optimizer = without_loss(rule)
        for call in ("observe", "elbo"):
            with pytest.raises(UsageError, match=rf"^{call}\(\) needs a loss.*pass loss_fn.*sampled_params"):
                getattr(optimizer, call)(*batch)
        assert not optimizer._pending.observations.parts

    @pytest.mark.parametrize("rule", RULES)
    def test_something_else_in_place_of_the_model(self, rule: Any) -> None:
        for given in (None, 5):
            with pytest.raises(
                OptionError,
                match=r"model is of type .*pass the torch.nn.Module itself, and the parameters to train as params=",
            ):
                rule(given, lr=0.1, data_size=100)


class Weighted(nn.Module):
    """A loss with a weight that is to be learned."""

    def __init__(self) -> None:
        super().__init__()
        self.log_weight = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.log_weight.exp() * F.cross_entropy(outputs, targets, reduction="none") - self.log_weight


def plain(log_weight: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
    return log_weight.exp() * F.cross_entropy(outputs, targets, reduction="none")


class InModel(nn.Module):
    """The way out: the loss's parameter is the model's, and each sample is given it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.log_weight = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x), self.log_weight.expand(len(x))


def weighted(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    logits, log_weights = outputs
    return log_weights.exp() * F.cross_entropy(logits, targets, reduction="none") - log_weights


def make_with(rule: Any, backend: str, loss: Any, model: nn.Module | None = None) -> Any:
    if backend and (problem := backends()[backend].problem):
        pytest.skip(problem)
    settings = {"backend": backend, "hess_init": 0.5} if backend else {}
    return rule(model or network(), loss, data_size=100, lr=0.01, **settings)


class TestParametersOfTheLoss:
    @pytest.mark.parametrize(("rule", "backend"), [*RULES_AND_BACKENDS, (OGN, "fused")])
    @pytest.mark.parametrize("kind", ["module", "function", "plain tensor"])
    def test_are_said_to_be_untrained_once(self, rule: Any, backend: str, kind: str, batch: Batch) -> None:
        module = Weighted()
        tensor = torch.zeros((), dtype=torch.float64, requires_grad=True)
        loss, name = {
            "module": (module, "'log_weight'"),
            "function": (lambda z, y: module(z, y), r"a tensor of shape \(\)"),
            "plain tensor": (partial(plain, tensor), r"a tensor of shape \(\)"),
        }[kind]
        optimizer = make_with(rule, backend, loss)
        with pytest.warns(UntrainedLossWarning, match=f"depends on {name}, .*parameter of the model") as caught:
            optimizer.observe(*batch)
        assert [w.filename for w in caught] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.observe(*batch)
        assert module.log_weight.grad is None

    @pytest.mark.parametrize("backend", RECORDING)
    def test_are_said_to_be_untrained_without_a_self_check(self, backend: str, batch: Batch) -> None:
        if problem := backends()[backend].problem:
            pytest.skip(problem)
        module, options = Weighted(), {"check": "never"}
        optimizer = VOGN(network(), module, data_size=100, backend=backend, backend_options=options)
        with pytest.warns(UntrainedLossWarning, match="'log_weight'"):
            optimizer.observe(*batch)

    @pytest.mark.parametrize(("rule", "backend"), RULES_AND_BACKENDS)
    def test_constants_and_the_models_own_are_not_spoken_of(self, rule: Any, backend: str, batch: Batch) -> None:
        frozen = Weighted().requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make_with(rule, backend, frozen).observe(*batch)
            make_with(rule, backend, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]).double())).observe(*batch)

    def test_targets_that_require_a_gradient_are_no_parameters(self, batch: Batch) -> None:
        x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
        model = nn.Linear(3, 3).double()
        for backend in ("fused", "loop"):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                make_with(VOGN, backend, losses.gaussian, model).observe(batch[0], x)

    @pytest.mark.parametrize("backend", RECORDING)
    def test_in_a_block_they_get_their_gradient_as_ever(self, backend: str, batch: Batch) -> None:
        """And another optimizer can train them."""
        x, y = batch
        module, optimizer = Weighted(), make_with(VOGN, backend, None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with optimizer.sampled_params(train=True):
                module(optimizer.model(x), y).mean().backward()
                outputs = optimizer.model(x).detach()
            optimizer.step()
        torch.testing.assert_close(module.log_weight.grad, F.cross_entropy(outputs, y) - 1)

    @pytest.mark.parametrize("backend", ["loop", "vmap", "fused"])
    def test_as_a_part_of_the_model_they_are_trained(self, backend: str, batch: Batch) -> None:
        """The gradient of sample i by the weight is exp(w) ce_i − 1."""
        x, y = batch
        model = InModel()
        optimizer = make_with(VOGN, backend, weighted, model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.observe(x, y)
            generator = generator_of(5)
            with optimizer.sampled_params(generator=generator), torch.no_grad():
                rows = model.log_weight.exp() * F.cross_entropy(model.net(x), y, reduction="none") - 1
            source = optimizer.source
            with optimizer.sampled_params(generator=generator_of(5)):
                moments = source.moments(x, y)
        torch.testing.assert_close(moments.mean["log_weight"], rows.mean())
        torch.testing.assert_close(moments.second_moment["log_weight"], rows.square().mean())
        optimizer.step()
        assert model.log_weight != 0

    @pytest.mark.parametrize("rule", [IVON, Vadam, MeanFieldVI])
    def test_as_a_part_of_the_model_with_the_other_rules(self, rule: Any, batch: Batch) -> None:
        model = InModel()
        optimizer = make_with(rule, "", weighted, model)
        optimizer.observe(*batch)
        optimizer.step()
        assert model.log_weight != 0
