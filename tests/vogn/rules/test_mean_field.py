"""Mean-field VI against a transcription in NumPy: Blundell et al. 2015, section 3.2, and Adam.

w = μ + σ ∘ ε,  σ = log(1 + exp(ρ))
objective = E[mean loss at w] + τ Σ (λ σ² + λ (μ − m₀)² − 1 − log(λ σ²)) / 2 / N
Adam (Kingma and Ba 2015, algorithm 1) on μ and ρ, whose gradients are here found by hand.
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

from persample.losses import gaussian
from persample.testing.devices import generator_of
from persample.vogn import MeanFieldVI

from .problems import PROBLEMS, Array, Batch, Noise, Problem, as_tensors, shared_noise, weights_of

STEPS = 12


class Adam:
    def __init__(self, lr: float, betas: tuple[float, float], eps: float) -> None:
        self.lr, self.betas, self.eps = lr, betas, eps
        self.m: Any = 0.0
        self.v: Any = 0.0
        self.t = 0

    def step(self, x: Array, g: Array) -> Array:
        self.t += 1
        self.m = self.betas[0] * self.m + (1 - self.betas[0]) * g
        self.v = self.betas[1] * self.v + (1 - self.betas[1]) * g**2
        m_hat = self.m / (1 - self.betas[0] ** self.t)
        v_hat = self.v / (1 - self.betas[1] ** self.t)
        return x - self.lr * m_hat / (np.sqrt(v_hat) + self.eps)


def bayes_by_backprop(
    mu: list[Array], minibatches: list[list[Batch]], problem: Problem, noise: Noise, c: dict[str, Any]
) -> Iterator[tuple[list[Array], list[Array]]]:
    """Yield μ and σ after every step. All parts of a mini-batch meet the same draws."""
    weight = c["temperature"] / c["data_size"]
    precision = c["prior_precision"]
    rho = [np.full_like(m, np.log(np.exp(c["scale_init"]) - 1)) for m in mu]
    adams = [Adam(c["lr"], c["betas"], c["eps"]) for _ in range(2 * len(mu))]
    for parts in minibatches:
        x = np.concatenate([part[0] for part in parts])
        y = np.concatenate([part[1] for part in parts])
        sigma = [np.log(1 + np.exp(r)) for r in rho]
        by_mu = [np.zeros_like(m) for m in mu]
        by_sigma = [np.zeros_like(m) for m in mu]
        for _ in range(c["mc_samples"]):
            epsilon = noise()
            w = [m + sd * e for m, sd, e in zip(mu, sigma, epsilon, strict=True)]
            for k, g in enumerate(problem.gradients(w, x, y)):
                by_mu[k] += g.mean(0) / c["mc_samples"]
                by_sigma[k] += g.mean(0) * epsilon[k] / c["mc_samples"]
        for k in range(len(mu)):
            by_mu[k] += weight * precision * (mu[k] - c["prior_mean"])
            by_sigma[k] += weight * (precision * sigma[k] - 1 / sigma[k])
            by_rho = by_sigma[k] * np.exp(rho[k]) / (1 + np.exp(rho[k]))
            mu[k] = adams[2 * k].step(mu[k], by_mu[k])
            rho[k] = adams[2 * k + 1].step(rho[k], by_rho)
        yield [m.copy() for m in mu], [np.log(1 + np.exp(r)) for r in rho]


@st.composite
def settings_of_mean_field(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "data_size": draw(st.integers(5, 500)),
        "prior_precision": draw(st.floats(0.1, 50)),
        "prior_mean": draw(st.sampled_from([0.0, 0.7])),
        "lr": draw(st.floats(0, 0.05)),
        "betas": draw(st.sampled_from([(0.9, 0.999), (0.0, 0.5)])),
        "eps": draw(st.sampled_from([1e-8, 1e-3])),
        "scale_init": draw(st.sampled_from([0.01, 1.0])),
        "temperature": draw(st.sampled_from([1.0, 0.2])),
        "mc_samples": draw(st.integers(1, 3)),
    }


@pytest.mark.parametrize("name", PROBLEMS)
@settings(max_examples=25, deadline=None)
@given(
    chosen=settings_of_mean_field(),
    sizes=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=STEPS, max_size=STEPS),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_the_transcription(name: str, chosen: dict[str, Any], sizes: list[list[int]], seed: int) -> None:
    problem = PROBLEMS[name]
    model, minibatches = problem.model(seed), problem.batches(sizes, seed)
    truth = bayes_by_backprop(weights_of(model), minibatches, problem, shared_noise(model, seed), chosen)
    optimizer = MeanFieldVI(model, problem.loss_fn, generator=generator_of(seed), **chosen)
    for parts, (mu, sigma) in zip(minibatches, truth, strict=True):
        for part in parts:
            optimizer.observe(*as_tensors(part), redraw=False)
        optimizer.step()
        for p, mu_p in zip(model.parameters(), mu, strict=True):
            np.testing.assert_allclose(p.detach().numpy(force=True), mu_p, rtol=1e-6, atol=1e-8)
        for precision, sigma_p in zip(optimizer._precision(), sigma, strict=True):
            np.testing.assert_allclose(precision.numpy(force=True), sigma_p**-2, rtol=1e-6)


def test_the_steps_are_those_of_adam_on_the_objective_by_autograd() -> None:
    """The same objective, written with torch.distributions, its gradient by autograd, updated by torch.optim.Adam."""
    model = PROBLEMS["linear regression"].model(0)
    mu = [p.detach().clone().requires_grad_() for p in model.parameters()]
    rho = [torch.full_like(p, -2.0).requires_grad_() for p in mu]
    optimizer = MeanFieldVI(
        model,
        gaussian,
        data_size=30,
        lr=0.01,
        prior_precision=2.0,
        scale_init=nn.functional.softplus(torch.tensor(-2.0, dtype=torch.float64)).item(),
        generator=generator_of(0),
    )
    adam, noise = torch.optim.Adam([*mu, *rho], lr=0.01), shared_noise(model, 0)
    for (batch,) in PROBLEMS["linear regression"].batches([[5]] * 6, 0):
        x, y = as_tensors(batch)
        optimizer.observe(x, y)
        optimizer.step()
        sigma = [nn.functional.softplus(r) for r in rho]
        weight, bias = (m + s * torch.as_tensor(e) for m, s, e in zip(mu, sigma, noise(), strict=True))
        loss = gaussian(x @ weight.T + bias, y).mean()
        for m, s in zip(mu, sigma, strict=True):
            q, prior = torch.distributions.Normal(m, s), torch.distributions.Normal(torch.zeros_like(m), 2.0**-0.5)
            loss = loss + torch.distributions.kl_divergence(q, prior).sum() / 30
        adam.zero_grad()
        loss.backward()
        adam.step()
        for p, m in zip(model.parameters(), mu, strict=True):
            torch.testing.assert_close(p.detach(), m.detach(), rtol=1e-7, atol=1e-9)
        for p, r in zip(model.parameters(), rho, strict=True):
            torch.testing.assert_close(optimizer.state[p]["rho"], r.detach(), rtol=1e-7, atol=1e-9)
