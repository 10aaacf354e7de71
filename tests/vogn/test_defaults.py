"""The defaults of VOGN train small tables and regression without tuning, no worse than Adam's."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from persample import losses
from persample.testing.devices import generator_of
from persample.vogn import VOGN, presets

from .ways import network

Data = tuple[Tensor, Tensor, Tensor, Tensor]


def table() -> Data:
    """Three classes that depend on eight numbers, with noise: 1,000 rows to train, 2,000 to test."""
    g = generator_of(100)
    x = torch.randn(3000, 8, generator=g)
    logits = (x @ torch.randn(8, 12, generator=g) / 2).tanh() @ torch.randn(12, 3, generator=g)
    y = torch.multinomial(logits.softmax(1), 1, generator=g)[:, 0]
    return x[:1000], y[:1000], x[1000:], y[1000:]


def regression() -> Data:
    """Noise whose width depends on the input."""
    g = generator_of(200)
    x = torch.randn(3000, 4, generator=g)
    noise = (0.1 + 0.4 * (2 * x[:, 3]).sigmoid()) * torch.randn(3000, generator=g)
    y = ((2 * x[:, 0]).sin() + 0.5 * x[:, 1] * x[:, 2] + noise)[:, None]
    return x[:1000], y[:1000], x[1000:], y[1000:]


def gaussian_of_two(outputs: Tensor, targets: Tensor) -> Tensor:
    mean, log_variance = outputs.chunk(2, 1)
    entries = (targets - mean).square() / log_variance.exp() + log_variance + math.log(2 * math.pi)
    return 0.5 * entries.sum(1)


def network_for(x: Tensor, outputs: int, width: int, activation: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(x.shape[1], width), activation(), nn.Linear(width, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def epochs(number: int) -> list[Tensor]:
    g = generator_of(1)
    return [rows for _ in range(number) for rows in torch.randperm(1000, generator=g).split(32)]


@pytest.mark.parametrize(
    ("data", "outputs", "loss_fn", "number", "width", "activation"),
    [
        (table, 3, losses.cross_entropy, 12, 64, nn.ReLU),
        (table, 3, losses.cross_entropy, 40, 32, nn.Tanh),
        (regression, 2, gaussian_of_two, 40, 64, nn.ReLU),
    ],
)
def test_no_worse_than_adam(
    data: Callable[[], Data],
    outputs: int,
    loss_fn: Callable[..., Tensor],
    number: int,
    width: int,
    activation: type[nn.Module],
) -> None:
    x, y, x_test, y_test = data()
    model = network_for(x, outputs, width, activation)
    adam = torch.optim.Adam(model.parameters())
    for rows in epochs(number):
        adam.zero_grad()
        loss_fn(model(x[rows]), y[rows]).mean().backward()
        adam.step()
    with torch.no_grad():
        by_adam = loss_fn(model(x_test), y_test).mean().item()

    model = network_for(x, outputs, width, activation)
    optimizer = VOGN(model, loss_fn, data_size=len(x), generator=generator_of(2))
    for rows in epochs(number):
        optimizer.observe(x[rows], y[rows])
        optimizer.step()
    log_likelihoods = optimizer.posterior.log_likelihoods(loss_fn, x_test, y_test, generator=generator_of(3))
    by_vogn = -(log_likelihoods.logsumexp(0) - math.log(32)).mean().item()
    assert by_vogn < by_adam + 0.02


def test_algorithm_1_is_a_preset() -> None:
    group = VOGN(network(), data_size=10, lr=0.2, prior_precision=3.0, decay=0.9, **presets.algorithm1()).param_groups[
        0
    ]
    printed = {"order": "printed", "momentum": 0.0, "temperature": 1.0, "hess_init": 0.0, "damping": 0.0}
    assert {name: group[name] for name in printed} == printed
    assert group["max_update"] is None
