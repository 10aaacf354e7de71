"""The backend decides how fast the moments come, and nothing else: the same seed gives the same training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from persample import backends
from persample.losses import cross_entropy
from persample.testing.devices import generator_of
from persample.vogn import VOGN


def trajectory(backend: str) -> list[torch.Tensor]:
    """Mean and curvature after each of ten steps of a small convolutional network, and predictions at the end."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(3, 4, 2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 5),
        nn.Tanh(),
        nn.Linear(5, 3),
    ).double()
    data = generator_of(1)
    vogn = VOGN(
        model,
        cross_entropy,
        data_size=500,
        lr=0.02,
        hess_init=0.1,
        decay=0.9,
        momentum=0.8,
        mc_samples=2,
        backend=backend,
        generator=generator_of(2),
    )
    states = []
    for _ in range(10):
        for size in (5, 2):
            x = torch.randn(size, 2, 10, 10, generator=data, dtype=torch.float64)
            vogn.observe(x, torch.randint(3, (size,), generator=data))
        vogn.step()
        states += [p.detach().clone() for p in model.parameters()]
        states += [vogn.state[p]["curvature"].clone() for p in model.parameters()]
    return [*states, vogn.predict(x, samples=4).probabilities]


@pytest.fixture(scope="module")
def expected() -> list[torch.Tensor]:
    return trajectory("loop")


@pytest.mark.parametrize("backend", [name for name in backends() if name != "loop"])
def test_all_backends_train_alike(backend: str, expected: list[torch.Tensor]) -> None:
    problem = backends()[backend].problem
    if problem:
        pytest.skip(problem)
    for actual, truth in zip(trajectory(backend), expected, strict=True):
        torch.testing.assert_close(actual, truth, rtol=1e-9, atol=1e-9 * truth.abs().max().item())
