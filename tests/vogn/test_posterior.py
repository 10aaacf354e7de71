"""The posterior as a distribution: against torch.distributions, NumPy, and the optimizer that it comes from."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, strategies
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence

from persample import Posterior, Prior
from persample.errors import OptionError, UsageError
from persample.testing.devices import generator_of
from persample.vogn import VOGN

Train = Callable[..., None]
SHAPES = {"weight": (3, 4), "bias": (4,), "scale": ()}


def posterior(seed: int = 0) -> Posterior:
    generator = generator_of(seed)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mean = {name: normal(shape) for name, shape in SHAPES.items()}
    return Posterior(mean, {name: normal(shape).exp() for name, shape in SHAPES.items()})


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in SHAPES])


def as_distribution(p: Posterior | Prior) -> Independent:
    return Independent(Normal(flat(p.mean), flat(p.precision) ** -0.5), 1)


class TestAgainstTorchDistributions:
    def test_log_prob(self) -> None:
        own, weights = posterior(), posterior(1).mean
        torch.testing.assert_close(
            own.log_prob(weights), as_distribution(own).log_prob(flat(weights)).cpu(), rtol=1e-13, atol=0
        )

    def test_log_prob_has_a_gradient(self) -> None:
        own, weights = posterior(), posterior(1).mean
        leaves = {name: w.requires_grad_() for name, w in weights.items()}
        own.log_prob(leaves).backward()
        for name, leaf in leaves.items():
            expected = -own.precision[name] * (leaf.detach() - own.mean[name])
            torch.testing.assert_close(leaf.grad, expected, rtol=1e-13, atol=0)

    def test_entropy(self) -> None:
        own = posterior()
        torch.testing.assert_close(own.entropy(), as_distribution(own).entropy().cpu(), rtol=1e-13, atol=0)

    @pytest.mark.parametrize("form", ["posterior", "prior", "number"])
    def test_kl(self, form: str) -> None:
        own, other = posterior(), posterior(1)
        if form == "number":
            prior = Prior.isotropic(0.7, own.mean)
            expected = kl_divergence(as_distribution(own), as_distribution(prior))
            actual = own.kl(0.7)
        else:
            expected = kl_divergence(as_distribution(own), as_distribution(other))
            actual = own.kl(other if form == "posterior" else other.as_prior())
        torch.testing.assert_close(actual, expected.cpu(), rtol=1e-12, atol=0)

    def test_kl_to_itself_is_zero(self) -> None:
        assert posterior().kl(posterior()).item() == pytest.approx(0, abs=1e-14)

    def test_variance_and_scale(self) -> None:
        own = posterior()
        for name, precision in own.precision.items():
            torch.testing.assert_close(own.variance[name], 1 / precision)
            torch.testing.assert_close(own.scale[name].square(), 1 / precision)

    def test_samples_have_mean_and_variance(self) -> None:
        own, generator = posterior(), generator_of(3)
        draws = torch.stack([flat(own.sample(generator)) for _ in range(4000)])
        standard = (draws - flat(own.mean)) * flat(own.precision).sqrt()
        assert standard.mean(0).abs().max() < 5 / 4000**0.5
        assert (standard.var(0) - 1).abs().max() < 5 * (2 / 4000) ** 0.5


def test_half_precision_parameters_have_a_posterior_in_float32() -> None:
    model = nn.Linear(2, 2).bfloat16()
    own = VOGN(model, nn.CrossEntropyLoss(), data_size=10).posterior
    assert {t.dtype for t in (*own.mean.values(), *own.precision.values())} == {torch.float32}


class TestOfAnOptimizer:
    def test_is_its_mean_and_its_precision(self, model: nn.Module, vogn: VOGN, train: Train) -> None:
        train(vogn)
        own = vogn.posterior
        for name, p in model.named_parameters():
            assert torch.equal(own.mean[name], p.detach())
            expected = 100 * vogn.state[p]["curvature"].numpy(force=True) + 1.0
            np.testing.assert_allclose(own.precision[name].numpy(force=True), expected, rtol=1e-14)
        assert own.model is model

    def test_draws_what_the_optimizer_draws(self, model: nn.Module, vogn: VOGN, train: Train) -> None:
        train(vogn)
        drawn = vogn.posterior.sample(generator_of(4))
        with vogn.sampled_params(generator=generator_of(4)):
            for name, p in model.named_parameters():
                assert torch.equal(drawn[name], p.detach())

    def test_stays_as_it_is_while_training_goes_on(self, vogn: VOGN, train: Train) -> None:
        train(vogn)
        own = vogn.posterior
        before = {name: (own.mean[name].clone(), own.precision[name].clone()) for name in own.mean}
        train(vogn)
        for name, (mean, precision) in before.items():
            assert torch.equal(own.mean[name], mean)
            assert torch.equal(own.precision[name], precision)
        assert not torch.equal(vogn.posterior.mean["0.weight"], own.mean["0.weight"])

    def test_the_prior_has_the_precision_of_each_group(
        self, model: nn.Sequential, make_vogn: Callable[..., VOGN]
    ) -> None:
        groups = [
            {"params": model[0].parameters(), "prior_precision": 3.0},
            {"params": model[2].parameters()},
        ]
        prior = make_vogn(model, params=groups, prior_precision=2.0).prior
        assert {name: value.unique().item() for name, value in prior.precision.items()} == {
            "0.weight": 3.0,
            "0.bias": 3.0,
            "2.weight": 2.0,
            "2.bias": 2.0,
        }
        assert all(not value.any() for value in prior.mean.values())

    def test_is_refused_inside_a_draw(self, vogn: VOGN) -> None:
        with vogn.sampled_params(), pytest.raises(UsageError, match="inside"):
            _ = vogn.posterior


class TestPrune:
    def test_the_ratio_is_mean_over_scale(self) -> None:
        own = posterior()
        for name, value in own.signal_to_noise().items():
            torch.testing.assert_close(value, own.mean[name].abs() * own.precision[name].sqrt())

    @given(fraction=strategies.floats(0, 1))
    def test_removes_the_lowest_ratios(self, fraction: float) -> None:
        own = posterior()
        pruned = own.prune(fraction)
        ratios = np.abs(flat(own.mean).numpy(force=True)) * np.sqrt(flat(own.precision).numpy(force=True))
        gone = np.argsort(ratios, kind="stable")[: round(fraction * ratios.size)]
        expected = flat(own.mean).numpy(force=True).copy()
        expected[gone] = 0
        np.testing.assert_array_equal(flat(pruned.mean).numpy(force=True), expected)
        assert np.flatnonzero(np.isinf(flat(pruned.precision).numpy(force=True))).tolist() == sorted(gone.tolist())

    def test_every_draw_has_the_removed_weights_at_zero(self) -> None:
        own = posterior().prune(0.5)
        removed = flat(own.precision).isinf()
        assert removed.sum() == 8  # of 17, by rounding to even
        for _ in range(5):
            drawn = flat(own.sample())
            assert not drawn[removed].any()
            assert drawn[~removed].all()

    def test_pruning_again_counts_what_is_gone(self) -> None:
        own = posterior()
        assert torch.equal(flat(own.prune(0.3).prune(0.6).mean), flat(own.prune(0.6).mean))
        assert torch.equal(flat(own.prune(0.6).prune(0.3).mean), flat(own.prune(0.6).mean))

    @pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
    def test_refuses_what_is_no_share(self, fraction: float) -> None:
        with pytest.raises(OptionError, match="fraction="):
            posterior().prune(fraction)

    @pytest.mark.parametrize(
        "ask",
        [
            lambda p: p.entropy(),
            lambda p: p.log_prob(p.mean),
            lambda p: p.kl(1.0),
            lambda p: posterior().kl(p),
            lambda p: p.as_prior(),
        ],
        ids=["entropy", "log_prob", "kl", "kl to it", "as_prior"],
    )
    def test_a_pruned_posterior_has_no_density(self, ask: Callable[[Posterior], object]) -> None:
        with pytest.raises(UsageError, match="pruned"):
            ask(posterior().prune(0.2))


class TestRefused:
    def test_keys_that_differ(self) -> None:
        own = posterior()
        with pytest.raises(OptionError, match="'bias' is only in one"):
            Posterior(own.mean, {name: value for name, value in own.precision.items() if name != "bias"})

    def test_weights_of_another_shape(self) -> None:
        own = posterior()
        with pytest.raises(OptionError, match=r"'bias'.*same shape"):
            own.log_prob({**own.mean, "bias": torch.zeros(1, 4)})

    @pytest.mark.parametrize("precision", [0.0, -1.0])
    def test_kl_to_what_is_no_proper_prior(self, precision: float) -> None:
        with pytest.raises(OptionError, match="precision"):
            posterior().kl(precision)
