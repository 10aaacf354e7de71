"""VOGN against a transcription of Algorithm 1 in NumPy, written from its printed lines, gradients by hand included.

w      = μ_t + σ_t ∘ ε,      ε ~ N(0, I),   σ_t = 1 / sqrt(N s_t + λ)
g_i    = −∇ log p(D_i | w),  i in the mini-batch
ĝ      = Σ g_i / M
s_{t+1} = γ s_t + (1 − γ) Σ g_i² / M
μ_{t+1} = μ_t − α (ĝ + λ μ_t / N) / (s_t + λ / N)
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
from torch import nn

from persample import losses
from persample.testing.devices import generator_of
from persample.vogn import VOGN, DangerousFirstStepWarning

from .problems import PROBLEMS, Array, Batch, Noise, Problem, as_tensors, shared_noise, weights_of

STEPS = 30


def algorithm1(
    mu: list[Array],
    minibatches: list[list[Batch]],
    problem: Problem,
    noise: Noise,
    *,
    data_size: int,
    lr: float,
    prior_precision: float,
    decay: float,
    hess_init: float,
    mc_samples: int,
    order: str,
    momentum: float,
) -> Iterator[tuple[list[Array], list[Array]]]:
    """Yield μ and s after every step; a step's mini-batch may come in several parts."""
    s = [np.full_like(m, hess_init) for m in mu]
    average = [np.zeros_like(m) for m in mu]
    for t, parts in enumerate(minibatches, start=1):
        rows: list[list[Array]] = [[] for _ in mu]
        for x, y in parts:
            for _ in range(mc_samples):
                sigma = [1 / np.sqrt(data_size * s_k + prior_precision) for s_k in s]
                w = [m + sd * e for m, sd, e in zip(mu, sigma, noise(), strict=True)]
                for collected, g in zip(rows, problem.gradients(w, x, y), strict=True):
                    collected.extend(g)
        g_hat = [sum(g) / len(g) for g in rows]
        h = [sum(g_i**2 for g_i in g) / len(g) for g in rows]
        average = [momentum * a + (1 - momentum) * g for a, g in zip(average, g_hat, strict=True)]
        s_next = [decay * s_k + (1 - decay) * h_k for s_k, h_k in zip(s, h, strict=True)]
        divisor = s if order == "printed" else s_next
        mu = [
            m - lr * (a / (1 - momentum**t) + prior_precision * m / data_size) / (d + prior_precision / data_size)
            for m, a, d in zip(mu, average, divisor, strict=True)
        ]
        s = s_next
        yield mu, s


@st.composite
def settings_of_vogn(draw: st.DrawFn) -> dict[str, Any]:
    """Settings under which 30 steps move far, but do not diverge, which would blow rounding errors up."""
    data_size = draw(st.integers(1, 1000))
    prior = draw(st.floats(0.03, 1))  # λ/N
    return {
        "data_size": data_size,
        "prior_precision": prior * data_size,
        "lr": prior * draw(st.floats(0, 0.3)),
        "decay": draw(st.sampled_from([0.0, 1.0]) | st.floats(0, 1)),
        "hess_init": draw(st.just(0.0) | st.floats(1e-6, 2)),
        "mc_samples": draw(st.integers(1, 2)),
        "order": draw(st.sampled_from(["printed", "updated"])),
        "momentum": draw(st.just(0.0) | st.floats(0, 0.95)),
    }


def compare(name: str, chosen: dict[str, Any], sizes: list[list[int]], seed: int) -> None:
    """Train with VOGN and with the transcription, and compare μ and s after every step."""
    problem = PROBLEMS[name]
    model, minibatches = problem.model(seed), problem.batches(sizes, seed)
    truth = algorithm1(weights_of(model), minibatches, problem, shared_noise(model, seed), **chosen)
    vogn = VOGN(
        model,
        problem.loss_fn,
        backend="loop",
        generator=generator_of(seed),
        temperature=1.0,
        **chosen,
    )
    for parts, (mu, s) in zip(minibatches, truth, strict=True):
        for part in parts:
            vogn.observe(*as_tensors(part))
        vogn.step()
        for p, mu_p, s_p in zip(model.parameters(), mu, s, strict=True):
            np.testing.assert_allclose(p.detach().numpy(force=True), mu_p, rtol=1e-9, atol=1e-11)
            np.testing.assert_allclose(vogn.state[p]["curvature"].numpy(force=True), s_p, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("problem", PROBLEMS)
@settings(max_examples=12, deadline=None)
@given(
    chosen=settings_of_vogn(),
    sizes=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=2), min_size=STEPS, max_size=STEPS),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_algorithm_1(problem: str, chosen: dict[str, Any], sizes: list[list[int]], seed: int) -> None:
    compare(problem, chosen, sizes, seed)


@pytest.mark.parametrize("order", ["printed", "updated"])
def test_agrees_from_curvature_zero_as_printed(order: str) -> None:
    chosen = {"data_size": 50, "lr": 0.02, "prior_precision": 10.0, "decay": 0.99, "hess_init": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error", DangerousFirstStepWarning)  # λ/N = 0.2 makes even s_0 = 0 safe here
        compare("tanh network", {**chosen, "mc_samples": 1, "order": order, "momentum": 0.0}, [[4]] * STEPS, 3)


def test_agrees_without_a_prior() -> None:
    chosen = {"data_size": 50, "lr": 0.1, "prior_precision": 0.0, "decay": 0.9, "hess_init": 1.0}
    compare("softmax regression", {**chosen, "mc_samples": 2, "order": "printed", "momentum": 0.9}, [[4]] * STEPS, 3)


def test_the_two_orders_differ() -> None:
    """Otherwise the comparisons above could not tell them apart."""
    means = []
    for order in ("printed", "updated"):
        torch.manual_seed(0)
        model = nn.Linear(3, 2).double()
        vogn = VOGN(
            model,
            losses.cross_entropy,
            data_size=10,
            decay=0.5,
            hess_init=0.5,
            backend="loop",
            order=order,
            generator=generator_of(0),
        )
        vogn.observe(torch.ones(2, 3, dtype=torch.float64), torch.tensor([0, 1]))
        vogn.step()
        means.append(model.weight.detach().clone())
    assert not torch.allclose(*means, rtol=1e-6, atol=0)
