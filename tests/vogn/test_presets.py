"""The presets do what the published code did: a transcription of that code, in its own conventions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import persample
from persample.testing.devices import generator_of
from persample.vogn import VOGN, presets

from .rules.problems import PROBLEMS, Array, as_tensors, shared_noise, weights_of


@pytest.mark.parametrize(
    ("preset", "prior_variance", "kl_start", "kl_steps", "size_scale", "draws"),
    [
        (presets.osawa2019_lenet5, 1e-2, 0.1, 11719, 1, 6),
        (presets.osawa2019_resnet18, 0.02, None, None, 10, 5),
        (presets.osawa2019_vgg19, 2.0, None, None, 10, 5),
    ],
)
def test_osawa_2019_on_several_gpus(
    preset: Callable[[], dict[str, Any]],
    prior_variance: float,
    kl_start: float | None,
    kl_steps: int | None,
    size_scale: float,
    draws: int,
) -> None:
    """Momentum of sums, an average whose weight 0.999 is that of the new value, L2 regularisation kl / n / variance.

    From the second step on, because the first is taken at the mean there.
    """
    problem = PROBLEMS["tanh network"]
    model, n = problem.model(0), 50 * size_scale
    mu = weights_of(model)
    generator = generator_of(0)
    vogn = VOGN(model, problem.loss_fn, data_size=50, backend="loop", generator=generator, **preset())
    noise = shared_noise(model, 0)
    buffer = [np.zeros_like(m) for m in mu]
    ema = [np.full_like(m, 1.0) for m in mu]
    for step, ((x, y),) in enumerate(problem.batches([[4]] * 5, 0)):
        kl = 1.0 if kl_start is None or kl_steps is None else kl_start + step / kl_steps * (1 - kl_start)
        l2 = kl / n / prior_variance
        rows: list[list[Array]] = [[] for _ in mu]
        for _ in range(draws):
            std = [np.sqrt(kl / n) * np.sqrt(1 / (e + 1e-3 + l2)) for e in ema]
            w = [m + s * e for m, s, e in zip(mu, std, noise(), strict=True)]
            for collected, g in zip(rows, problem.gradients(w, x, y), strict=True):
                collected.extend(g)
        for k, g in enumerate(rows):
            buffer[k] = 0.9 * buffer[k] + sum(g) / len(g) + l2 * mu[k]
            ema[k] = 0.999 * sum(g_i**2 for g_i in g) / len(g) + 0.001 * ema[k]
            mu[k] = mu[k] - 1e-4 * buffer[k] / (ema[k] + 1e-3 + l2)
        vogn.observe(*as_tensors((x, y)))
        vogn.step()
        for p, m in zip(model.parameters(), mu, strict=True):
            np.testing.assert_allclose(p.detach().numpy(force=True), m, rtol=1e-9, atol=1e-11)


def test_osawa_2019_on_one_gpu() -> None:
    """An average of gradients in which the new one has weight 0.1, and of curvatures in which it has weight 0.001."""
    problem = PROBLEMS["softmax regression"]
    model = problem.model(0)
    mu = weights_of(model)
    generator = generator_of(0)
    settings = presets.osawa2019_lenet5_batchnorm()
    vogn = VOGN(model, problem.loss_fn, data_size=50, backend="loop", generator=generator, **settings)
    noise = shared_noise(model, 0)
    buffer = [np.zeros_like(m) for m in mu]
    ema = [np.full_like(m, 8e-3) for m in mu]
    for ((x, y),) in problem.batches([[4]] * 5, 0):
        rows: list[list[Array]] = [[] for _ in mu]
        for _ in range(10):
            w = [m + np.sqrt(1 / 50) * np.sqrt(1 / (e + 1 / 50)) * z for m, e, z in zip(mu, ema, noise(), strict=True)]
            for collected, g in zip(rows, problem.gradients(w, x, y), strict=True):
                collected.extend(g)
        for k, g in enumerate(rows):
            buffer[k] = 0.9 * buffer[k] + 0.1 * (sum(g) / len(g) + mu[k] / 50)
            ema[k] = 0.001 * sum(g_i**2 for g_i in g) / len(g) + 0.999 * ema[k]
            mu[k] = mu[k] - 0.01 * buffer[k] / (ema[k] + 1 / 50)
        vogn.observe(*as_tensors((x, y)))
        vogn.step()
    for p, m in zip(model.parameters(), mu, strict=True):
        np.testing.assert_allclose(p.detach().numpy(force=True), m, rtol=1e-9, atol=1e-11)


def test_khan_2018() -> None:
    """The precision itself is averaged, and the mean divided by the new one."""
    problem = PROBLEMS["linear regression"]
    model, n = problem.model(0), 345
    mu = weights_of(model)
    generator = generator_of(0)
    settings = presets.khan2018_australian()
    vogn = VOGN(model, problem.loss_fn, data_size=n, backend="loop", generator=generator, mc_samples=2, **settings)
    noise = shared_noise(model, 0)
    precision = [np.ones_like(m) for m in mu]
    for ((x, y),) in problem.batches([[4]] * 5, 0):
        rows: list[list[Array]] = [[] for _ in mu]
        for _ in range(2):
            w = [m + z / np.sqrt(p) for m, p, z in zip(mu, precision, noise(), strict=True)]
            for collected, g in zip(rows, problem.gradients(w, x, y), strict=True):
                collected.extend(g)
        for k, g in enumerate(rows):
            precision[k] = 0.999 * precision[k] + 0.001 * (n * sum(g_i**2 for g_i in g) / len(g) + 1)
            mu[k] = mu[k] - 1e-3 * (n * sum(g) / len(g) + mu[k]) / precision[k]
        vogn.observe(*as_tensors((x, y)))
        vogn.step()
    for p, m in zip(model.parameters(), mu, strict=True):
        np.testing.assert_allclose(p.detach().numpy(force=True), m, rtol=1e-9, atol=1e-11)
    for found, expected in zip(vogn._precision(), precision, strict=True):
        np.testing.assert_allclose(found.numpy(force=True), expected, rtol=1e-9)


def test_algorithm_1_is_found_from_the_package() -> None:
    assert persample.vogn.presets.algorithm1() == {
        "order": "printed",
        "momentum": 0.0,
        "temperature": 1.0,
        "hess_init": 0.0,
    }
