"""VOGN with all its settings against a transcription of the rule in NumPy, written from its equations.

N = ρ · data_size                                                              Osawa et al. 2019, algorithm 1, line 2
τ_t = τ_start + (τ − τ_start) · min(t / steps, 1),  t = 0, 1, …                the same, section 3 (KL warm-up)
w = μ_t + σ_t ∘ ε,  σ_t² = τ_t / (N (s_t + d) + τ_t λ)                         line 9
ĝ = Σ g_i / M,  h = Σ g_i² / M over samples and draws                          lines 11 to 14
ĝ ← ĝ · min(1, c / (‖ĝ‖ + 1e-6))                                               gradient clipping
m_{t+1} = β m_t + (1 − β) ĝ                                                    Kingma and Ba 2015
m̂ = m_{t+1} / (1 − β^{t+1}), or m_{t+1} without bias correction
s_{t+1} = γ s_t + (1 − γ) h                                                    Algorithm 1 of Jain and Khan, line 6
u = (m̂ + τ_t λ (μ_t − m₀) / N) / (s + d + τ_t λ / N),  s = s_t or s_{t+1}      line 7, and Osawa et al., line 19
μ_{t+1} = μ_t − α clip(u, ±ξ)                                                  Shen et al. 2024

Where the prior is averaged too, ĝ + τ_t λ (μ_t − m₀) / N takes the place of ĝ in m, and m̂ stands alone in u.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persample.testing.devices import generator_of
from persample.vogn import VOGN, DangerousFirstStepWarning

from .choices import CHANGES, shared_settings
from .problems import PROBLEMS, Array, Batch, Noise, Problem, as_tensors, shared_noise, weights_of

STEPS = 12


def whole_rule(
    mu: list[Array],
    minibatches: list[list[Batch]],
    problem: Problem,
    noise: Noise,
    precision: list[Array],
    prior_mean: list[Array],
    c: dict[str, Any],
) -> Iterator[tuple[list[Array], list[Array], list[Array]]]:
    """Yield μ, s and σ after every step."""
    n = c["augmentation"] * c["data_size"]
    places = range(len(mu))
    s = [np.full_like(m, c["hess_init"]) for m in mu]
    average = [np.zeros_like(m) for m in mu]

    def temperature(t: int) -> float:
        if c["temperature_steps"] == 0:
            return c["temperature"]
        return c["temperature_start"] + (c["temperature"] - c["temperature_start"]) * min(t / c["temperature_steps"], 1)

    def sigma(t: int) -> list[Array]:
        tau = temperature(t)
        return [np.sqrt(tau / (n * (s[k] + c["damping"]) + tau * precision[k])) for k in places]

    for t, parts in enumerate(minibatches):
        tau = temperature(t)
        rows: list[list[Array]] = [[] for _ in mu]
        for x, y in parts:
            for _ in range(c["mc_samples"]):
                w = [m + sd * e for m, sd, e in zip(mu, sigma(t), noise(), strict=True)]
                for k, g in enumerate(problem.gradients(w, x, y)):
                    rows[k].extend(g)
        g_hat = [sum(g) / len(g) for g in rows]
        h = [sum(g_i**2 for g_i in g) / len(g) for g in rows]
        if c["max_grad_norm"] is not None:
            norm = np.sqrt(sum((g**2).sum() for g in g_hat))
            g_hat = [g * min(1, c["max_grad_norm"] / (norm + 1e-6)) for g in g_hat]
        prior = [tau * precision[k] * (mu[k] - prior_mean[k]) / n for k in places]
        averaged = [g + p for g, p in zip(g_hat, prior, strict=True)] if c["average_prior"] else g_hat
        beta = c["momentum"]
        average = [beta * a + (1 - beta) * g for a, g in zip(average, averaged, strict=True)]
        used = [a / (1 - beta ** (t + 1)) for a in average] if c["bias_correction"] else average
        numerator = used if c["average_prior"] else [u + p for u, p in zip(used, prior, strict=True)]
        s_next = [c["decay"] * s[k] + (1 - c["decay"]) * h[k] for k in places]
        divisor = s if c["order"] == "printed" else s_next
        u = [numerator[k] / (divisor[k] + c["damping"] + tau * precision[k] / n) for k in places]
        if c["max_update"] is not None:
            u = [np.clip(v, -c["max_update"], c["max_update"]) for v in u]
        mu = [mu[k] - c["lr"] * u[k] for k in places]
        s = s_next
        yield mu, s, sigma(t + 1)


def all_settings() -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(lambda chosen, draws: chosen | {"mc_samples": draws}, shared_settings(), st.integers(1, 2))


def compare(name: str, chosen: dict[str, Any], sizes: list[list[int]], seed: int, each_weight: bool) -> None:
    problem = PROBLEMS[name]
    model, minibatches = problem.model(seed), problem.batches(sizes, seed)
    start = weights_of(model)
    rng = np.random.default_rng(seed)
    precision = [np.full_like(m, chosen["prior_precision"]) for m in start]
    prior_mean = [np.full_like(m, chosen["prior_mean"]) for m in start]
    given = dict(chosen)
    if each_weight:
        precision = [p * rng.uniform(0.5, 2, p.shape) for p in precision]
        prior_mean = [rng.standard_normal(m.shape) for m in prior_mean]
        names = [name for name, _ in model.named_parameters()]
        given["prior_precision"] = dict(zip(names, map(torch.as_tensor, precision), strict=True))
        given["prior_mean"] = dict(zip(names, map(torch.as_tensor, prior_mean), strict=True))
    truth = whole_rule(start, minibatches, problem, shared_noise(model, seed), precision, prior_mean, chosen)
    generator = generator_of(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DangerousFirstStepWarning)
        optimizer = VOGN(model, problem.loss_fn, backend="loop", generator=generator, **given)
        for parts, (mu, s, sigma) in zip(minibatches, truth, strict=True):
            for part in parts:
                optimizer.observe(*as_tensors(part))
            optimizer.step()
            for p, mu_p, s_p in zip(model.parameters(), mu, s, strict=True):
                np.testing.assert_allclose(p.detach().numpy(force=True), mu_p, rtol=1e-9, atol=1e-11)
                np.testing.assert_allclose(
                    optimizer.state[p]["curvature"].numpy(force=True), s_p, rtol=1e-9, atol=1e-11
                )
            for variance, sigma_p in zip(optimizer._precision(), sigma, strict=True):
                np.testing.assert_allclose(variance.numpy(force=True), sigma_p**-2, rtol=1e-9)


@pytest.mark.parametrize("name", PROBLEMS)
@settings(max_examples=25, deadline=None)
@given(
    chosen=all_settings(),
    sizes=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=2), min_size=STEPS, max_size=STEPS),
    seed=st.integers(0, 2**31),
    each_weight=st.booleans(),
)
def test_agrees_with_the_transcription(
    name: str, chosen: dict[str, Any], sizes: list[list[int]], seed: int, each_weight: bool
) -> None:
    compare(name, chosen, sizes, seed, each_weight)


BASE: dict[str, Any] = {
    "data_size": 20,
    "augmentation": 1.0,
    "prior_precision": 4.0,
    "prior_mean": 0.0,
    "lr": 0.05,
    "decay": 0.8,
    "hess_init": 0.5,
    "momentum": 0.0,
    "bias_correction": True,
    "average_prior": False,
    "order": "printed",
    "damping": 0.0,
    "temperature": 1.0,
    "temperature_start": 0.01,
    "temperature_steps": 0,
    "max_update": None,
    "max_grad_norm": None,
    "mc_samples": 1,
}


@pytest.mark.parametrize(
    ("base", "change"), [*CHANGES, ({}, {"mc_samples": 2})], ids=lambda change: "-".join(map(str, change))
)
def test_each_setting_matters(base: dict[str, Any], change: dict[str, Any]) -> None:
    """Otherwise the comparison above could not tell whether it is obeyed."""
    problem = PROBLEMS["tanh network"]

    def end(chosen: dict[str, Any]) -> torch.Tensor:
        model = problem.model(0)
        vogn = VOGN(
            model,
            problem.loss_fn,
            backend="loop",
            generator=generator_of(0),
            **chosen,
        )
        for (batch,) in problem.batches([[4]] * 3, 0):
            vogn.observe(*as_tensors(batch))
            vogn.step()
        return next(model.parameters()).detach().clone()

    assert not torch.allclose(end(BASE | base), end(BASE | base | change), rtol=1e-6, atol=0)
