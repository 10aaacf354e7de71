"""Vadam against a transcription of figure 1 of Khan et al., ICML 2018, in NumPy.

w = μ_t + σ_t ∘ ε,  σ_t = 1 / sqrt(N s_t + λ);  with temperature σ_t² = τ / (N s_t + τ λ)
ĝ = Σ g_i / M at w, of each draw
m_{t+1} = β₁ m_t + (1 − β₁) (ĝ + τ λ (μ_t − m₀) / N),  m̂ = m_{t+1} / (1 − β₁^{t+1})
s_{t+1} = β₂ s_t + (1 − β₂) ĝ²,                        ŝ = s_{t+1} / (1 − β₂^{t+1})
μ_{t+1} = μ_t − α m̂ / (sqrt(ŝ) + τ λ / N)

with ĝ and ĝ² averaged over the draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from persample.losses import cross_entropy
from persample.testing.devices import generator_of
from persample.vogn import Vadam

from .problems import PROBLEMS, Array, Batch, Noise, Problem, as_tensors, shared_noise, weights_of

STEPS = 12


def vadam(
    mu: list[Array], minibatches: list[list[Batch]], problem: Problem, noise: Noise, c: dict[str, Any]
) -> Iterator[tuple[list[Array], list[Array]]]:
    """Yield μ and σ after every step. All parts of a mini-batch meet the same draws."""
    n, tau, precision = c["data_size"], c["temperature"], c["prior_precision"]
    beta1, beta2 = c["betas"]
    m = [np.zeros_like(p) for p in mu]
    s = [np.full_like(p, c["hess_init"]) for p in mu]

    def sigma() -> list[Array]:
        return [np.sqrt(tau / (n * s_k + tau * precision)) for s_k in s]

    for t, parts in enumerate(minibatches):
        x = np.concatenate([part[0] for part in parts])
        y = np.concatenate([part[1] for part in parts])
        draws = []
        for _ in range(c["mc_samples"]):
            w = [p + sd * e for p, sd, e in zip(mu, sigma(), noise(), strict=True)]
            draws.append([g.mean(0) for g in problem.gradients(w, x, y)])
        for k, p in enumerate(mu):
            g = sum(draw[k] for draw in draws) / len(draws)
            g_squared = sum(draw[k] ** 2 for draw in draws) / len(draws)
            m[k] = beta1 * m[k] + (1 - beta1) * (g + tau * precision * (p - c["prior_mean"]) / n)
            s[k] = beta2 * s[k] + (1 - beta2) * g_squared
            m_hat, s_hat = m[k] / (1 - beta1 ** (t + 1)), s[k] / (1 - beta2 ** (t + 1))
            mu[k] = p - c["lr"] * m_hat / (np.sqrt(s_hat) + tau * precision / n)
        yield [p.copy() for p in mu], sigma()


@st.composite
def settings_of_vadam(draw: st.DrawFn) -> dict[str, Any]:
    data_size = draw(st.integers(5, 500))
    prior = draw(st.floats(0.05, 1))
    return {
        "data_size": data_size,
        "prior_precision": prior * data_size,
        "prior_mean": draw(st.sampled_from([0.0, 0.7])),
        "lr": prior * draw(st.floats(0, 0.05)),
        "betas": draw(st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.5, 0.0)])),
        "hess_init": draw(st.sampled_from([0.0, 0.3])),
        "temperature": draw(st.sampled_from([1.0, 0.2])),
        "mc_samples": draw(st.integers(1, 3)),
    }


@pytest.mark.parametrize("name", PROBLEMS)
@settings(max_examples=25, deadline=None)
@given(
    chosen=settings_of_vadam(),
    sizes=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=STEPS, max_size=STEPS),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_the_transcription(name: str, chosen: dict[str, Any], sizes: list[list[int]], seed: int) -> None:
    problem = PROBLEMS[name]
    model, minibatches = problem.model(seed), problem.batches(sizes, seed)
    truth = vadam(weights_of(model), minibatches, problem, shared_noise(model, seed), chosen)
    optimizer = Vadam(model, problem.loss_fn, generator=generator_of(seed), **chosen)
    for parts, (mu, sigma) in zip(minibatches, truth, strict=True):
        for part in parts:
            optimizer.observe(*as_tensors(part), redraw=False)
        optimizer.step()
        for p, mu_p in zip(model.parameters(), mu, strict=True):
            np.testing.assert_allclose(p.detach().numpy(force=True), mu_p, rtol=1e-9, atol=1e-11)
        for precision, sigma_p in zip(optimizer._precision(), sigma, strict=True):
            np.testing.assert_allclose(precision.numpy(force=True), sigma_p**-2, rtol=1e-9)


def test_samples_may_be_mixed() -> None:
    """No gradients of single samples are needed, so BatchNorm in training mode is fine."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    vadam = Vadam(model, cross_entropy, data_size=10)
    running = model[1].running_mean.clone()
    vadam.observe(torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))
    vadam.step()
    assert not torch.equal(model[1].running_mean, running)
    assert model[0].weight.grad is None
