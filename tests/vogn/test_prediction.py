"""Predictions over draws, against NumPy on the outputs of each draw."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persample import Posterior, losses
from persample.errors import OptionError, UsageError
from persample.vogn import VOGN

from .draws_by_hand import broad_posterior, outputs_by_hand, seeded

Train = Callable[..., None]
Batch = tuple[Tensor, Tensor]


class TestClasses:
    @pytest.fixture
    def logits(self, model: nn.Module, vogn: VOGN, batch: Batch, train: Train) -> np.ndarray[Any, Any]:
        train(vogn)
        return outputs_by_hand(model, vogn.posterior, batch[0], 7)

    @pytest.mark.parametrize("draws_at_once", [1, 3, None])
    def test_categorical(
        self, draws_at_once: int | None, logits: np.ndarray[Any, Any], vogn: VOGN, batch: Batch
    ) -> None:
        predicted = vogn.predict(batch[0], samples=7, generator=seeded(), draws_at_once=draws_at_once)
        p = np.exp(logits) / np.exp(logits).sum(2, keepdims=True)
        mean = p.mean(0)
        entropy = -(mean * np.log(mean)).sum(1)
        information = entropy + (p * np.log(p)).sum(2).mean(0)
        np.testing.assert_allclose(predicted.probabilities.numpy(force=True), mean, rtol=1e-12)
        np.testing.assert_allclose(predicted.entropy.numpy(force=True), entropy, rtol=1e-12)
        np.testing.assert_allclose(predicted.mutual_information.numpy(force=True), information, rtol=1e-8)

    @pytest.mark.parametrize("draws_at_once", [1, 3, None])
    def test_bernoulli(self, draws_at_once: int | None, logits: np.ndarray[Any, Any], vogn: VOGN, batch: Batch) -> None:
        predicted = vogn.predict(
            batch[0], likelihood="bernoulli", samples=7, generator=seeded(), draws_at_once=draws_at_once
        )

        def entropy(p: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            return -p * np.log(p) - (1 - p) * np.log(1 - p)

        p = 1 / (1 + np.exp(-logits))
        np.testing.assert_allclose(predicted.probabilities.numpy(force=True), p.mean(0), rtol=1e-12)
        np.testing.assert_allclose(predicted.entropy.numpy(force=True), entropy(p.mean(0)), rtol=1e-12)
        information = entropy(p.mean(0)) - entropy(p).mean(0)
        np.testing.assert_allclose(predicted.mutual_information.numpy(force=True), information, rtol=1e-8)

    @pytest.mark.parametrize(
        ("loss_fn", "likelihood"),
        [
            (losses.bernoulli, "bernoulli"),
            (nn.BCEWithLogitsLoss(), "bernoulli"),
            (functools.partial(F.binary_cross_entropy_with_logits, reduction="none"), "bernoulli"),
            (nn.CrossEntropyLoss(), "categorical"),
            (lambda outputs, targets: outputs.sum(1), "categorical"),
        ],
    )
    @pytest.mark.parametrize("outputs", [1, 3])
    def test_without_a_likelihood_it_is_that_of_the_loss(self, loss_fn: Any, likelihood: Any, outputs: int) -> None:
        optimizer = VOGN(nn.Linear(4, outputs).double(), loss_fn, data_size=50, hess_init=0.5)
        x = torch.randn(8, 4, generator=seeded(1), dtype=torch.float64)
        if likelihood == "categorical" and outputs == 1:
            for predict in (optimizer.predict, optimizer.posterior.predict):
                with pytest.raises(
                    UsageError, match=r'one class, whose softmax is always 1: use likelihood="bernoulli"'
                ):
                    predict(x)
            return
        predicted = optimizer.predict(x, samples=3, generator=seeded())
        said = optimizer.predict(x, likelihood=likelihood, samples=3, generator=seeded())
        assert torch.equal(predicted.probabilities, said.probabilities)
        whole = (predicted.probabilities.sum(1) - 1).abs().max() < 1e-12
        assert whole == (likelihood == "categorical")

    @pytest.mark.parametrize(
        ("loss_fn", "way_out"),
        [
            (losses.gaussian, "predict_gaussian"),
            (functools.partial(losses.gaussian, noise_precision=2.0), "predict_gaussian"),
            (nn.MSELoss(), "predict_gaussian"),
            (nn.BCELoss(), "return logits"),
        ],
    )
    def test_losses_without_classes_or_logits_are_refused(self, loss_fn: Any, way_out: str) -> None:
        optimizer = VOGN(nn.Linear(4, 3), loss_fn, data_size=50, hess_init=0.5)
        with pytest.raises(UsageError, match=way_out):
            optimizer.predict(torch.randn(8, 4))
        assert optimizer.predict(torch.randn(8, 4), likelihood="categorical").probabilities.shape == (8, 3)

    def test_with_positions(self) -> None:
        """Logits (B, C, d): the classes are in dim 1, and each position has an entropy of its own."""
        model = nn.Conv1d(2, 3, 1).double()
        x = torch.randn(4, 2, 5, generator=seeded(1), dtype=torch.float64)
        predicted = broad_posterior(model).predict(x, samples=3)
        assert predicted.probabilities.shape == (4, 3, 5)
        assert predicted.entropy.shape == predicted.mutual_information.shape == (4, 5)
        torch.testing.assert_close(predicted.probabilities.sum(1), torch.ones(4, 5, dtype=torch.float64))

    def test_what_is_certain_has_no_entropy(self) -> None:
        model = nn.Linear(1, 2).double()
        posterior = broad_posterior(model).prune(1.0)
        posterior = Posterior({**posterior.mean, "bias": torch.tensor([1e4, 0.0]).double()}, posterior.precision, model)
        predicted = posterior.predict(torch.ones(3, 1, dtype=torch.float64), samples=4)
        assert torch.equal(predicted.probabilities, torch.tensor([[1.0, 0.0]]).double().expand(3, 2))
        assert not predicted.entropy.any()
        assert not predicted.mutual_information.any()

    def test_information_is_never_negative(self) -> None:
        model = nn.Linear(2, 3)
        tiny = Posterior(
            {name: p.detach() for name, p in model.named_parameters()},
            {name: torch.full_like(p, 1e12, requires_grad=False) for name, p in model.named_parameters()},
            model,
        )
        assert (tiny.predict(torch.randn(500, 2), samples=8).mutual_information >= 0).all()

    def test_refuses_an_unknown_likelihood(self, vogn: VOGN, batch: Batch) -> None:
        with pytest.raises(OptionError, match="predict_gaussian"):
            vogn.predict(batch[0], likelihood="gaussian")  # type: ignore[arg-type]


class TestGaussian:
    @pytest.mark.parametrize("draws_at_once", [1, 3, None])
    def test_against_numpy(
        self, draws_at_once: int | None, model: nn.Module, vogn: VOGN, batch: Batch, train: Train
    ) -> None:
        train(vogn)
        outputs = outputs_by_hand(model, vogn.posterior, batch[0], 7) + 0
        predicted = vogn.predict_gaussian(
            batch[0], noise_precision=4.0, samples=7, generator=seeded(), draws_at_once=draws_at_once
        )
        np.testing.assert_allclose(predicted.mean.numpy(force=True), outputs.mean(0), rtol=1e-12)
        np.testing.assert_allclose(predicted.epistemic_variance.numpy(force=True), outputs.var(0, ddof=1), rtol=1e-10)
        assert torch.equal(predicted.aleatoric_variance, torch.full((6, 2), 0.25, dtype=torch.float64))
        torch.testing.assert_close(predicted.variance, predicted.epistemic_variance + 0.25)

    def test_a_large_mean_does_not_swallow_the_variance(self) -> None:
        model = nn.Linear(1, 1)
        posterior = Posterior(
            {"weight": torch.zeros(1, 1), "bias": torch.tensor([1e4])},
            {"weight": torch.ones(1, 1), "bias": torch.full((1,), 1e6)},
            model,
        )
        x = torch.ones(1, 1)
        outputs = outputs_by_hand(model, posterior, x, 64)
        predicted = posterior.predict_gaussian(x, samples=64, generator=seeded())
        np.testing.assert_allclose(predicted.epistemic_variance.numpy(force=True), outputs.var(0, ddof=1), rtol=1e-3)

    @pytest.mark.parametrize("noise_precision", [0.0, -1.0, float("nan"), float("inf")])
    def test_refuses_what_is_no_precision(self, noise_precision: float, vogn: VOGN, batch: Batch) -> None:
        with pytest.raises(OptionError, match="noise_precision="):
            vogn.predict_gaussian(batch[0], noise_precision=noise_precision)

    def test_refuses_a_single_draw(self, vogn: VOGN, batch: Batch) -> None:
        with pytest.raises(OptionError, match="samples=1"):
            vogn.predict_gaussian(batch[0], samples=1)
