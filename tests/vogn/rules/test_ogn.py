"""OGN with all its settings against a transcription of its own in NumPy: the online Gauss-Newton method.

N = ρ · data_size,  P = τ_t λ / N,  0 < τ_t ≤ τ grows evenly from τ_start over the first steps
ĝ = Σ ∇ℓ_i(μ_t) / M,  h = Σ ∇ℓ_i(μ_t)² / M                                     no draw: both at the mean
ĝ ← ĝ · min(1, c / (‖ĝ‖ + 1e-6))                                               gradient clipping
v_{t+1} = β v_t + (1 − β) ĝ,  v̂ = v_{t+1} / (1 − β^{t+1})                      momentum, with or without its correction
s_{t+1} = γ s_t + (1 − γ) h
μ_{t+1} = μ_t − α clip((v̂ + P (μ_t − m₀)) / (s + d + P), ±ξ),  s = s_t or s_{t+1}

Where the prior is averaged too, v is that of ĝ + P (μ_t − m₀), and stands alone. The posterior, an online Laplace
approximation, has the precision (N (s + d) + τ_t λ) / τ_t: see Osawa et al. 2019 and Khan et al. 2019.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persample.testing.devices import generator_of
from persample.vogn import OGN, VOGN, DangerousFirstStepWarning

from .choices import CHANGES, shared_settings
from .problems import PROBLEMS, Array, Batch, as_tensors, weights_of

STEPS = 12


@dataclass(frozen=True)
class Settings:
    """All that the rule depends on."""

    data_size: int = 20
    augmentation: float = 1.0
    prior_precision: float = 4.0
    prior_mean: float = 0.0
    lr: float = 0.05
    decay: float = 0.8
    hess_init: float = 0.5
    momentum: float = 0.0
    bias_correction: bool = True
    average_prior: bool = False
    order: str = "printed"
    damping: float = 0.0
    temperature: float = 1.0
    temperature_start: float = 0.01
    temperature_steps: int = 0
    max_update: float | None = None
    max_grad_norm: float | None = None

    def tau(self, t: int) -> float:
        grown = 1.0 if self.temperature_steps == 0 else min(1.0, t / self.temperature_steps)
        return (1 - grown) * self.temperature_start + grown * self.temperature


def flat(parts: list[Array]) -> Array:
    """All parameters in one row; with `parts` of B rows each, in B rows."""
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


def online_gauss_newton(
    start: list[Array], minibatches: list[list[Batch]], gradients: Any, c: Settings
) -> Iterator[tuple[Array, Array, Array]]:
    """Yield μ, s and the precision of the posterior after every step, over all parameters in one row."""
    shapes = [w.shape for w in start]
    ends = np.cumsum([w.size for w in start])[:-1]
    mu = flat([w[None] for w in start])[0]
    s, v = np.full_like(mu, c.hess_init), np.zeros_like(mu)
    n = c.augmentation * c.data_size
    for t, parts in enumerate(minibatches):
        weights = [w.reshape(shape) for w, shape in zip(np.split(mu, ends), shapes, strict=True)]
        g = np.concatenate([flat(gradients(weights, x, y)) for x, y in parts])  # a row for each sample
        mean, h = g.mean(0), (g * g).mean(0)
        if c.max_grad_norm is not None:
            mean = mean * min(1.0, c.max_grad_norm / (np.linalg.norm(mean) + 1e-6))
        p = c.tau(t) * c.prior_precision / n
        pull = p * (mu - c.prior_mean)
        v = c.momentum * v + (1 - c.momentum) * (mean + pull * c.average_prior)
        corrected = v / (1 - c.momentum ** (t + 1)) if c.bias_correction else v
        newer = c.decay * s + (1 - c.decay) * h
        below = {"printed": s, "updated": newer}[c.order] + c.damping + p
        step = (corrected + pull * (not c.average_prior)) / below
        if c.max_update is not None:
            step = np.minimum(np.maximum(step, -c.max_update), c.max_update)
        mu, s = mu - c.lr * step, newer
        tau = c.tau(t + 1)
        yield mu, s, (n * (s + c.damping) + tau * c.prior_precision) / tau


@pytest.mark.parametrize("name", PROBLEMS)
@settings(max_examples=25, deadline=None)
@given(
    chosen=st.builds(lambda chosen: Settings(**chosen), shared_settings()),
    sizes=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=2), min_size=STEPS, max_size=STEPS),
    seed=st.integers(0, 2**31),
    mc_samples=st.integers(1, 2),
)
def test_agrees_with_the_transcription(
    name: str, chosen: Settings, sizes: list[list[int]], seed: int, mc_samples: int
) -> None:
    """Several draws for a step are all the mean, so they change nothing."""
    problem = PROBLEMS[name]
    model, minibatches = problem.model(seed), problem.batches(sizes, seed)
    truth = online_gauss_newton(weights_of(model), minibatches, problem.gradients, chosen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DangerousFirstStepWarning)
        ogn = OGN(model, problem.loss_fn, backend="loop", mc_samples=mc_samples, **vars(chosen))
        for parts, (mu, s, precision) in zip(minibatches, truth, strict=True):
            for part in parts:
                ogn.observe(*as_tensors(part))
            ogn.step()
            for found, due in (
                ([p.detach() for p in model.parameters()], mu),
                ([ogn.state[p]["curvature"] for p in model.parameters()], s),
                (ogn._precision(), precision),
            ):
                row = torch.cat([tensor.flatten() for tensor in found]).numpy(force=True)
                np.testing.assert_allclose(row, due, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("base", "change"), CHANGES, ids=lambda change: "-".join(map(str, change)))
def test_each_setting_matters(base: dict[str, Any], change: dict[str, Any]) -> None:
    """Otherwise the comparison above could not tell whether it is obeyed."""
    problem = PROBLEMS["tanh network"]
    start, minibatches = weights_of(problem.model(0)), problem.batches([[4]] * 3, 0)
    ends = [
        list(online_gauss_newton(start, minibatches, problem.gradients, Settings(**chosen)))[-1][0]
        for chosen in (base, base | change)
    ]
    assert not np.allclose(*ends, rtol=1e-6, atol=0)


def test_the_state_of_one_is_that_of_the_other() -> None:
    """Settings are found with OGN first, and training goes on with VOGN."""
    problem = PROBLEMS["linear regression"]
    model = problem.model(0)
    ogn = OGN(model, problem.loss_fn, data_size=20, hess_init=0.5, backend="loop")
    for (batch,) in problem.batches([[4]] * 3, 0):
        ogn.observe(*as_tensors(batch))
        ogn.step()
    vogn = VOGN(model, problem.loss_fn, data_size=20, backend="loop")
    vogn.load_state_dict(ogn.state_dict())
    assert torch.equal(vogn.state[model.weight]["curvature"], ogn.state[model.weight]["curvature"])


def test_draws_nothing_while_training_but_has_a_posterior() -> None:
    problem = PROBLEMS["linear regression"]
    model, generator = problem.model(0), generator_of(0)
    before = generator.get_state()
    ogn = OGN(model, problem.loss_fn, data_size=20, hess_init=0.5, backend="loop", generator=generator)
    ogn.observe(*as_tensors(problem.batches([[4]], 0)[0][0]))
    ogn.step()
    assert torch.equal(generator.get_state(), before)
    mean = model.weight.detach().clone()
    with ogn.sampled_params():
        assert not torch.equal(model.weight, mean)
