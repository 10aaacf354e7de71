"""Likelihoods against `torch.distributions` and NumPy: as losses, in predictions, in the bound, and in the Fisher."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch import distributions as D

from persample import VOGN, Ensemble, Posterior, fisher, laplace, losses, make_source
from persample.errors import DataError, LossError, OptionError, UsageError
from persample.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    LearnedNoise,
    Poisson,
    TargetDistribution,
)
from persample.testing.devices import generator_of

Truth = Callable[[Tensor], D.Distribution]


def of_halves(outputs: Tensor) -> D.Distribution:
    mean, log_variance = outputs.chunk(2, 1)
    return D.Normal(mean, (0.5 * log_variance).exp())


# Each likelihood, the number of outputs for two targets, and what PyTorch calls it.
CASES: list[tuple[TargetDistribution, int, Truth]] = [
    (Bernoulli(), 2, lambda f: D.Bernoulli(logits=f)),
    (Gaussian(), 2, lambda f: D.Normal(f, 1.0)),
    (Gaussian(4.0), 2, lambda f: D.Normal(f, 0.5)),
    (HeteroscedasticGaussian(), 4, of_halves),
    (Poisson(), 2, lambda f: D.Poisson(f.exp())),
]
NAMES = ["bernoulli", "gaussian", "gaussian with noise", "heteroscedastic", "poisson"]


def outputs_of(number: int, size: int = 7) -> Tensor:
    return torch.randn(size, number, generator=generator_of(0), dtype=torch.float64)


@pytest.mark.parametrize(("likelihood", "number", "truth"), CASES, ids=NAMES)
class TestEach:
    def test_the_loss_is_minus_the_log_density(self, likelihood: Any, number: int, truth: Truth) -> None:
        outputs = outputs_of(number)
        torch.manual_seed(1)
        targets = truth(outputs).sample()
        torch.testing.assert_close(likelihood(outputs, targets), -truth(outputs).log_prob(targets).sum(1))

    def test_gradients_of_single_samples(self, likelihood: Any, number: int, truth: Truth) -> None:
        torch.manual_seed(0)
        model = nn.Linear(3, number).double()
        x = torch.randn(5, 3, dtype=torch.float64)
        targets = truth(model(x).detach()).sample()
        moments = [make_source(b, model, likelihood).moments(x, targets) for b in ("fused", "loop")]
        for name, square in moments[1].second_moment.items():
            torch.testing.assert_close(moments[0].second_moment[name], square)

    def test_draws_have_its_mean_and_variance(self, likelihood: Any, number: int, truth: Truth) -> None:
        outputs = outputs_of(number, 3)
        draws = likelihood.draw(outputs.repeat(40000, 1), generator_of(2)).view(40000, 3, 2)
        torch.testing.assert_close(draws.mean(0), truth(outputs).mean.double(), rtol=0.05, atol=0.03)
        torch.testing.assert_close(draws.var(0), truth(outputs).variance.double(), rtol=0.08, atol=0.03)

    def test_the_fisher_information_of_its_outputs(self, likelihood: Any, number: int, truth: Truth) -> None:
        """E[s sᵀ] of the score s = ∂ log p(y | f) / ∂f, by 400,000 drawn targets."""
        outputs = outputs_of(number, 1).repeat(400000, 1).requires_grad_()
        torch.manual_seed(3)
        targets = truth(outputs.detach()).sample()
        (score,) = torch.autograd.grad(truth(outputs).log_prob(targets).sum(), outputs)
        roots = torch.stack([v[0] for v in likelihood.roots(outputs[:1].detach())])
        torch.testing.assert_close(roots.T @ roots, score.T @ score / len(score), rtol=0.05, atol=0.03)

    def test_predictions_by_hand(self, likelihood: Any, number: int, truth: Truth) -> None:
        """The law of total variance over draws of the weights; of classes the average of the probabilities."""
        summary, draws = likelihood.summary(), [outputs_of(number) + k for k in (0.0, 0.3, -0.5)]
        summary.add(torch.stack(draws[:2]))
        summary.add(draws[2][None])
        found = summary.result()
        means = np.stack([truth(f).mean.numpy() for f in draws])
        if isinstance(likelihood, Bernoulli):
            np.testing.assert_allclose(found.probabilities.numpy(), means.mean(0))
            return
        variances = np.stack([np.broadcast_to(truth(f).variance.numpy(), means[0].shape) for f in draws])
        np.testing.assert_allclose(found.mean.numpy(), means.mean(0))
        np.testing.assert_allclose(found.epistemic_variance.numpy(), means.var(0, ddof=1))
        np.testing.assert_allclose(found.aleatoric_variance.numpy(), variances.mean(0))
        np.testing.assert_allclose(found.variance.numpy(), means.var(0, ddof=1) + variances.mean(0))

    def test_one_object_trains_predicts_and_bounds(self, likelihood: Any, number: int, truth: Truth) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, number)).double()
        x = torch.randn(6, 3, dtype=torch.float64)
        targets = truth(model(x).detach()).sample()
        optimizer = VOGN(model, likelihood, data_size=6, generator=generator_of(0))
        optimizer.observe(x, targets)
        optimizer.step()
        found = optimizer.predict(x, samples=4, generator=generator_of(1))
        again = optimizer.posterior.predict(x, likelihood=likelihood, samples=4, generator=generator_of(1))
        for name, value in vars(found).items():
            torch.testing.assert_close(value, vars(again)[name])
        bound = optimizer.elbo(x, targets, samples=4, generator=generator_of(1))
        table = optimizer.posterior.log_likelihoods(likelihood, x, targets, samples=4, generator=generator_of(1))
        assert bound.log_likelihood == pytest.approx(table.sum(1).mean().item())

    def test_its_exact_fisher_is_that_of_many_draws(self, likelihood: Any, number: int, truth: Truth) -> None:
        torch.manual_seed(0)
        model = nn.Linear(2, number).double()
        x = 0.5 * torch.randn(400, 2, dtype=torch.float64)
        y = torch.zeros(400, 2)
        exact, drawn = (
            fisher(model, [(x, y)], loss_fn=likelihood, kind=kind, draws=100, generator=generator_of(0)).diagonal
            for kind in ("exact", "mc")
        )
        for name, value in exact.items():
            torch.testing.assert_close(drawn[name], value, rtol=0.1, atol=0.03)


@pytest.mark.parametrize(
    ("likelihood", "information"),
    [
        (Gaussian(4.0), lambda f: torch.full_like(f, 4.0)),
        (Poisson(), torch.exp),
        (Bernoulli(), lambda f: f.sigmoid() * (1 - f.sigmoid())),
    ],
)
def test_outputs_of_one_number_each(likelihood: Any, information: Callable[[Tensor], Tensor]) -> None:
    """Shape (B,), as models with `squeeze` return it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    found = fisher(model, [(x, y)], loss_fn=likelihood, kind="exact")
    due = (information(model(x).detach())[:, None] * x.square()).mean(0, keepdim=True)
    torch.testing.assert_close(found.diagonal["0.weight"], due)
    optimizer = VOGN(model, likelihood, data_size=6)
    optimizer.observe(x, y)
    optimizer.step()
    assert likelihood(model(x), y).shape == (6,)
    assert next(iter(vars(optimizer.predict(x, samples=3)).values())).shape == (6,)


def test_categorical_is_cross_entropy() -> None:
    outputs, targets = outputs_of(3), torch.tensor([0, 1, 2, 1, 0, 2, 2])
    assert torch.equal(Categorical()(outputs, targets), losses.cross_entropy(outputs, targets))
    summary = Categorical().summary()
    summary.add(outputs[None])
    torch.testing.assert_close(summary.result().probabilities, outputs.softmax(1))


def test_categorical_with_the_classes_last() -> None:
    """As with the classes in dim 1, where predictions have them; ignored positions have no loss."""
    g = generator_of(0)
    outputs, targets = torch.randn(6, 4, 3, generator=g), torch.randint(3, (6, 4), generator=g)
    targets[2:4, 1:] = 0
    last, second = Categorical(classes_last=True, ignore_index=0), nn.CrossEntropyLoss(ignore_index=0, reduction="none")
    torch.testing.assert_close(last(outputs, targets), second(outputs.movedim(-1, 1), targets).sum(1))
    soft = outputs.flip(0).softmax(-1)
    due = losses.cross_entropy(outputs.movedim(-1, 1), soft.movedim(-1, 1))
    torch.testing.assert_close(Categorical(classes_last=True)(outputs, soft), due)
    summary = last.summary()
    summary.add(torch.stack([outputs, outputs + 1]))
    torch.testing.assert_close(summary.result().probabilities, outputs.softmax(-1).movedim(-1, 1))
    assert summary.result().entropy.shape == (6, 4)
    with pytest.raises(LossError, match=r"one class index for each position.*classes_last=True"):
        Categorical()(outputs, targets)
    with pytest.raises(LossError, match=r"logits of shape \(B, C, …\).*Bernoulli"):
        Categorical()(outputs[:, 0, 0], targets[:, 0])


def test_posteriors_predict_by_the_loss_they_were_trained_with() -> None:
    """In an ensemble, pruned and after Laplace, too: nothing has to be repeated, and no softmax is taken of means."""
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(3, 2), torch.randn(2, 6, 2).unbind()
    x = torch.cat([x, x[:, :1]], 1)
    optimizer = VOGN(model, Gaussian(4.0), data_size=6)
    optimizer.observe(x, y)
    optimizer.step()
    posterior = optimizer.posterior
    due = posterior.predict(x, likelihood=Gaussian(4.0), samples=3, generator=generator_of(0)).mean
    for one in (posterior, Ensemble([posterior])):
        predicted = one.predict(x, samples=3, generator=generator_of(0))
        assert torch.equal(predicted.mean, due)
        assert bool((predicted.aleatoric_variance == 0.25).all())
    information = fisher(model, [(x, y)], loss_fn=Gaussian(4.0))
    for other in (
        posterior.prune(0.2),
        laplace(model, [(x, y)], loss_fn=Gaussian(4.0)),
        laplace(model, information, loss_fn=Gaussian(4.0)),
        Ensemble.of_models([model, nn.Linear(3, 2)], loss_fn=Gaussian(4.0)),
    ):
        assert bool((other.predict(x, samples=2).aleatoric_variance == 0.25).all())
    mixed = Ensemble([posterior, Posterior(posterior.mean, posterior.precision, model, losses.bernoulli)])
    with pytest.raises(UsageError, match="losses of several likelihoods: pass likelihood="):
        mixed.predict(x)
    squared = Posterior(posterior.mean, posterior.precision, model, nn.MSELoss())
    with pytest.raises(UsageError, match=r"use predict_gaussian\(\)"):
        squared.predict(x)


def test_a_loss_that_shows_no_likelihood_is_not_kept() -> None:
    """So that a posterior can be pickled, whatever it was trained with."""
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    for loss_fn in (lambda outputs, targets: losses.cross_entropy(outputs, targets), Gaussian(4.0)):
        posterior = VOGN(model, loss_fn, data_size=6).posterior
        found = pickle.loads(pickle.dumps(posterior))
        assert found.loss_fn == posterior.loss_fn == (loss_fn if isinstance(loss_fn, Gaussian) else None)
        due = vars(posterior.predict(x, samples=3, generator=generator_of(0)))
        for name, value in vars(found.predict(x, samples=3, generator=generator_of(0))).items():
            assert torch.equal(value, due[name])


class TestFiles:
    @pytest.fixture(autouse=True)
    def _needs_safetensors(self) -> None:
        pytest.importorskip("safetensors")

    @pytest.mark.parametrize(
        "loss_fn",
        [
            None,
            losses.cross_entropy,
            nn.BCEWithLogitsLoss(),
            Categorical(ignore_index=1),
            Bernoulli(),
            Gaussian(4.0),
            HeteroscedasticGaussian(),
            Poisson(),
        ],
    )
    def test_a_loaded_posterior_predicts_as_the_saved_one(self, loss_fn: Any, tmp_path: Path) -> None:
        model, x = nn.Linear(3, 2), torch.randn(4, 3)
        posterior = VOGN(model, loss_fn, data_size=6).posterior
        posterior.save(tmp_path / "p")
        Ensemble([posterior]).save(tmp_path / "e")
        due = vars(posterior.predict(x, samples=3, generator=generator_of(0)))
        for loaded in (Posterior.load(tmp_path / "p", model), Ensemble.load(tmp_path / "e", model)):
            found = vars(loaded.predict(x, samples=3, generator=generator_of(0)))
            assert found.keys() == due.keys()
            assert all(torch.equal(value, due[name]) for name, value in found.items())
        if isinstance(loss_fn, TargetDistribution):
            assert Posterior.load(tmp_path / "p").loss_fn == loss_fn
            assert Posterior.load(tmp_path / "p", loss_fn=Gaussian(2.0)).loss_fn == Gaussian(2.0)

    def test_a_loss_that_a_file_can_only_name(self, tmp_path: Path) -> None:
        model, x = nn.Linear(3, 2), torch.randn(4, 3)
        VOGN(model, nn.MSELoss(), data_size=6).posterior.save(tmp_path / "p")
        Posterior.load(tmp_path / "p", model).save(tmp_path / "again")
        loaded = Posterior.load(tmp_path / "again", model)
        with pytest.raises(UsageError, match=r"the loss MSELoss, which its file does not hold: pass loss_fn=\.\.\."):
            loaded.predict(x)
        assert loaded.predict_gaussian(x, samples=2).mean.shape == (4, 2)

    def test_a_likelihood_of_somebody_else(self, tmp_path: Path) -> None:
        own = type("Gaussian", (Gaussian,), {"__module__": "elsewhere"})
        VOGN(nn.Linear(3, 2), own(4.0), data_size=6).posterior.save(tmp_path / "p")
        with pytest.raises(UsageError, match=r"the loss elsewhere\.Gaussian, which its file does not hold"):
            Posterior.load(tmp_path / "p", nn.Linear(3, 2)).predict(torch.zeros(1, 3))

    def test_a_damaged_likelihood(self, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = tmp_path / "p"
        VOGN(nn.Linear(3, 2), data_size=6).posterior.save(path)
        header = {"format": "persample posterior", "version": "1", "parameters": '["weight", "bias"]'}
        save_file(load_file(path), path, header)
        assert Posterior.load(path).loss_fn is None  # as earlier versions wrote it
        for text in ("[", "3", "{}", '{"name": "Gaussian", "noise_precision": -1}', '{"name": "Poisson", "x": 1}'):
            save_file(load_file(path), path, header | {"likelihood": text})
            with pytest.raises(DataError, match="damaged posterior: its header names no likelihood"):
                Posterior.load(path)


def test_learned_noise_finds_the_noise() -> None:
    """Of a linear function with noise 0.3, and none of the posterior's making."""
    g = generator_of(0)
    x = torch.randn(500, 1, generator=g)
    y = 2 * x + 0.3 * torch.randn(500, 1, generator=g)
    torch.manual_seed(0)
    model = LearnedNoise(nn.Linear(1, 1), 1)
    optimizer = VOGN(model, HeteroscedasticGaussian(), data_size=500, generator=generator_of(1))
    for _ in range(60):
        for rows in torch.randperm(500, generator=g).split(50):
            optimizer.observe(x[rows], y[rows])
            optimizer.step()
    predicted = optimizer.predict(x, samples=32)
    assert predicted.aleatoric_variance.sqrt().mean().item() == pytest.approx(0.3, abs=0.03)
    assert predicted.mean.shape == y.shape
    assert "log_variance" in optimizer.posterior.mean


class TestRefusals:
    @pytest.mark.parametrize(
        ("likelihood", "outputs"), [(HeteroscedasticGaussian(), (4, 2)), (Poisson(), (4, 1)), (Gaussian(), (4, 1))]
    )
    def test_targets_that_would_be_broadcast(self, likelihood: Any, outputs: tuple[int, int]) -> None:
        with pytest.raises(LossError, match="broadcasting them would pair the wrong entries"):
            likelihood(torch.zeros(outputs), torch.zeros(4))

    def test_one_output_where_two_are_due(self) -> None:
        with pytest.raises(LossError, match="twice as many outputs, or wrap it in LearnedNoise"):
            HeteroscedasticGaussian()(torch.zeros(4, 1), torch.zeros(4, 1))
        model = nn.Linear(2, 3)
        posterior = Posterior(*({n: torch.ones_like(p) for n, p in model.named_parameters()} for _ in range(2)), model)
        with pytest.raises(LossError, match="twice as many outputs"):
            posterior.predict(torch.zeros(2, 2), likelihood=HeteroscedasticGaussian())

    def test_targets_that_are_no_classes(self) -> None:
        with pytest.raises(LossError, match=r"probabilities of the classes.*targets\.long\(\)"):
            Categorical()(torch.zeros(4, 3), torch.zeros(4))
        with pytest.raises(LossError, match=r"with C > 1.*use Bernoulli"):
            Categorical()(torch.zeros(4, 1), torch.zeros(4).long())

    @pytest.mark.parametrize("kind", ["mc", "exact"])
    @pytest.mark.parametrize("wrong", [-1, 3])
    def test_classes_that_do_not_exist(self, kind: Any, wrong: int) -> None:
        x, y = torch.randn(4, 2), torch.tensor([0, wrong, 2, -100])
        with pytest.raises(LossError, match=f"3 classes, but a target is {wrong}.*ignore_index={wrong}"):
            fisher(nn.Linear(2, 3), [(x, y)], loss_fn=Categorical(), kind=kind)

    @pytest.mark.parametrize("outputs", [1, 2])
    def test_learned_noise_of_another_size(self, outputs: int) -> None:
        for model in (nn.Linear(2, 3), nn.Sequential(nn.Linear(2, 1), nn.Flatten(0))):
            with pytest.raises(LossError, match=f"has {outputs} log-variances, but its model returned means of shape"):
                LearnedNoise(model, outputs)(torch.zeros(4, 2))

    def test_a_class_in_place_of_a_likelihood(self) -> None:
        posterior = VOGN(nn.Linear(2, 3), data_size=4).posterior
        with pytest.raises(OptionError, match=r"is a class: pass an instance, Categorical\(\)"):
            posterior.predict(torch.zeros(2, 2), likelihood=Categorical)

    def test_a_noise_that_is_none(self) -> None:
        for value in (0.0, -1.0, math.inf, math.nan):
            with pytest.raises(OptionError, match="noise_precision="):
                Gaussian(value)

    def test_losses_of_real_numbers_still_say_where_to_go(self) -> None:
        optimizer = VOGN(nn.Linear(2, 1), losses.gaussian, data_size=4)
        with pytest.raises(UsageError, match=r"predict_gaussian\(\)"):
            optimizer.predict(torch.zeros(2, 2))
