"""IVON against a transcription of Algorithm 1 of Shen et al., ICML 2024, in NumPy, and against the published optimizer.

In the words of the paper, with the effective sample size E = N / τ, the weight decay δ = τ λ / N and prior mean m₀:

w = μ_t + σ_t ∘ ε,  σ_t = 1 / sqrt(E (h_t + δ))
ĝ = Σ g_i / M at w;  ĥ = ĝ (w − μ_t) / σ_t²;  both averaged over the draws
m_{t+1} = β₁ m_t + (1 − β₁) ĝ,  m̂ = m_{t+1} / (1 − β₁^{t+1})
h_{t+1} = β₂ h_t + (1 − β₂) ĥ + ½ (1 − β₂)² (h_t − ĥ)² / (h_t + δ)
μ_{t+1} = μ_t − α (h_0 + δ) clip((m̂ + δ (μ_t − m₀)) / (h_{t+1} + δ), ±ξ)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from persample.errors import OptionError
from persample.losses import cross_entropy
from persample.testing.devices import generator_of
from persample.vogn import IVON

from .problems import PROBLEMS, Array, Batch, Noise, Problem, as_tensors, shared_noise, weights_of

STEPS = 12


def ivon(
    mu: list[Array], minibatches: list[list[Batch]], problem: Problem, noise: Noise, c: dict[str, Any]
) -> Iterator[tuple[list[Array], list[Array]]]:
    """Yield μ and σ after every step. All parts of a mini-batch meet the same draws."""
    ess = c["data_size"] / c["temperature"]
    delta = c["temperature"] * c["prior_precision"] / c["data_size"]
    beta1, beta2 = c["betas"]
    m = [np.zeros_like(p) for p in mu]
    h = [np.full_like(p, c["hess_init"]) for p in mu]
    clip = np.inf if c["max_update"] is None else c["max_update"]
    lr = c["lr"] * (c["hess_init"] + delta if c["rescale_lr"] else 1)
    for t, parts in enumerate(minibatches):
        x = np.concatenate([part[0] for part in parts])
        y = np.concatenate([part[1] for part in parts])
        sigma = [1 / np.sqrt(ess * (h_k + delta)) for h_k in h]
        g_hat = [np.zeros_like(p) for p in mu]
        h_hat = [np.zeros_like(p) for p in mu]
        for _ in range(c["mc_samples"]):
            w = [p + sd * e for p, sd, e in zip(mu, sigma, noise(), strict=True)]
            for k, g in enumerate(problem.gradients(w, x, y)):
                g_hat[k] += g.mean(0) / c["mc_samples"]
                h_hat[k] += g.mean(0) * (w[k] - mu[k]) / sigma[k] ** 2 / c["mc_samples"]
        for k, p in enumerate(mu):
            m[k] = beta1 * m[k] + (1 - beta1) * g_hat[k]
            correction = 0.5 * (1 - beta2) ** 2 * (h[k] - h_hat[k]) ** 2 / (h[k] + delta)
            h[k] = beta2 * h[k] + (1 - beta2) * h_hat[k] + correction
            update = (m[k] / (1 - beta1 ** (t + 1)) + delta * (p - c["prior_mean"])) / (h[k] + delta)
            mu[k] = p - lr * np.clip(update, -clip, clip)
        yield [p.copy() for p in mu], [1 / np.sqrt(ess * (h_k + delta)) for h_k in h]


@st.composite
def settings_of_ivon(draw: st.DrawFn) -> dict[str, Any]:
    data_size = draw(st.integers(5, 500))
    return {
        "data_size": data_size,
        "prior_precision": draw(st.floats(0.05, 1)) * data_size,
        "prior_mean": draw(st.sampled_from([0.0, 0.7])),
        "lr": draw(st.floats(0, 0.02)),
        "betas": draw(st.sampled_from([(0.9, 0.99999), (0.0, 0.9), (0.5, 0.5)])),
        "hess_init": draw(st.sampled_from([0.1, 1.0])),
        "rescale_lr": draw(st.booleans()),
        "max_update": draw(st.sampled_from([None, 0.1])),
        "temperature": draw(st.sampled_from([1.0, 0.2])),
        "mc_samples": draw(st.integers(1, 3)),
    }


@pytest.mark.parametrize("name", PROBLEMS)
@settings(max_examples=25, deadline=None)
@given(
    chosen=settings_of_ivon(),
    sizes=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=STEPS, max_size=STEPS),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_the_transcription(name: str, chosen: dict[str, Any], sizes: list[list[int]], seed: int) -> None:
    problem = PROBLEMS[name]
    model, minibatches = problem.model(seed), problem.batches(sizes, seed)
    truth = ivon(weights_of(model), minibatches, problem, shared_noise(model, seed), chosen)
    optimizer = IVON(model, problem.loss_fn, generator=generator_of(seed), **chosen)
    for parts, (mu, sigma) in zip(minibatches, truth, strict=True):
        for part in parts:
            optimizer.observe(*as_tensors(part), redraw=False)
        optimizer.step()
        for p, mu_p in zip(model.parameters(), mu, strict=True):
            np.testing.assert_allclose(p.detach().numpy(force=True), mu_p, rtol=1e-7, atol=1e-9)
        for precision, sigma_p in zip(optimizer._precision(), sigma, strict=True):
            np.testing.assert_allclose(precision.numpy(force=True), sigma_p**-2, rtol=1e-7)


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def batches(number: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = generator_of(1)
    return [
        (torch.randn(6, 3, generator=generator).to(dtype), torch.randint(2, (6,), generator=generator))
        for _ in range(number)
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("beta2", [0.99999, 0.9])
def test_agrees_with_the_published_optimizer(
    dtype: torch.dtype, draws: int, clip: float | None, rescale: bool, beta2: float
) -> None:
    """The same global seed gives both the same noise."""
    published = pytest.importorskip("ivon", reason="ivon-opt is not installed")
    models = network(dtype), network(dtype)
    size, decay = 50, 1e-2
    theirs = published.IVON(
        models[0].parameters(),
        lr=0.1,
        ess=size,
        hess_init=0.5,
        beta2=beta2,
        weight_decay=decay,
        mc_samples=draws,
        clip_radius=float("inf") if clip is None else clip,
        rescale_lr=rescale,
    )
    ours = IVON(
        models[1],
        data_size=size,
        lr=0.1,
        hess_init=0.5,
        betas=(0.9, beta2),
        prior_precision=decay * size,
        max_update=clip,
        rescale_lr=rescale,
    )
    for seed, (x, y) in enumerate(batches(20, dtype)):
        for model, optimizer in zip(models, (theirs, ours), strict=True):
            torch.manual_seed(seed)
            for _ in range(draws):
                with optimizer.sampled_params(train=True):
                    model.zero_grad()
                    F.cross_entropy(model(x), y).backward()
            optimizer.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    hessian = torch.cat([state["hessian"].flatten() for state in ours.state.values()])
    torch.testing.assert_close(hessian, theirs.param_groups[0]["hess"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("beta2", [0.0, 0.5])
def test_the_precision_stays_positive(beta2: float) -> None:
    """Whatever ĥ is: h + δ is halved at most, also where h itself falls below 0."""
    optimizer = IVON(
        network(), cross_entropy, data_size=20, prior_precision=4.0, betas=(0.9, beta2), generator=generator_of(0)
    )
    below = False
    for x, y in batches(60):
        before = optimizer._precision()
        optimizer.observe(x, y)
        optimizer.step()
        assert all(bool((new >= 0.499 * old).all()) for new, old in zip(optimizer._precision(), before, strict=True))
        below = below or any(bool((state["hessian"] < 0).any()) for state in optimizer.state.values())
    assert below
    again = IVON(network(), cross_entropy, data_size=20)
    again.load_state_dict(optimizer.state_dict())  # a negative h is no damage


def test_a_prior_for_each_weight_rescales_each_weight() -> None:
    """With one number in all entries it is that number's prior."""
    models = network(), network()
    mapping = {name: torch.full_like(p, 3.0) for name, p in models[0].named_parameters()}
    for model, precision in zip(models, (3.0, mapping), strict=True):
        optimizer = IVON(
            model, cross_entropy, data_size=30, prior_precision=precision, max_update=0.5, generator=generator_of(0)
        )
        for x, y in batches(5):
            optimizer.observe(x, y)
            optimizer.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_unused_parameters_only_decay() -> None:
    """ĝ = ĥ = 0 there: the mean goes to the prior's."""
    model = network()
    model.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    optimizer = IVON(model, data_size=10, prior_precision=2.0, lr=0.5, generator=generator_of(0))
    x, y = batches(1)[0]
    with optimizer.sampled_params(train=True):
        F.cross_entropy(model(x), y).backward()
    optimizer.step()
    hessian = 0.99999 + 0.5 * 1e-10 / 1.2
    expected = 1 - 0.5 * 1.2 * 0.2 / (hessian + 0.2)
    torch.testing.assert_close(model.unused.detach(), torch.full((3,), expected, dtype=torch.float64))


def test_samples_may_be_mixed() -> None:
    """No gradients of single samples are needed, so BatchNorm in training mode is fine."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    optimizer = IVON(model, cross_entropy, data_size=10)
    optimizer.observe(*batches(1)[0])
    optimizer.step()


def test_a_group_of_processes(tmp_path: Any) -> None:
    """What the processes add up is ĝ and ĝ ∘ ε; of one process that is what it has."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        models = network(), network()
        together = IVON(
            models[0], cross_entropy, data_size=30, generator=generator_of(0), process_group=dist.group.WORLD
        )
        assert together._processes is not None
        alone = IVON(models[1], cross_entropy, data_size=30)
        for step, (x, y) in enumerate(batches(4)):
            alone.generator = together._processes.noise(together.generator.initial_seed(), step)
            noise = alone.generator.get_state()
            alone.observe(x, y)
            alone.step()
            alone.generator.set_state(noise)
            together.observe(x, y)
            together.step()
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    finally:
        dist.destroy_process_group()


def test_rescale_lr_is_a_truth_value() -> None:
    with pytest.raises(OptionError, match="rescale_lr=1 must be True or False"):
        IVON(network(), cross_entropy, data_size=10, rescale_lr=1)  # type: ignore[arg-type]
