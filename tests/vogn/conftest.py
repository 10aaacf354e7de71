"""A small classification problem in float64, and VOGN on it, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from persample.losses import cross_entropy
from persample.testing.devices import generator_of
from persample.vogn import VOGN

from .ways import PLAIN


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The tensors here are tiny: threads that wait for each other take ten times as long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = generator_of(1)
    return torch.randn(6, 3, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0])


@pytest.fixture
def make_vogn() -> Callable[..., VOGN]:
    """VOGN with the loop over samples, a seeded generator, and settings under which a few steps move visibly."""

    def make(model: nn.Module, **settings: Any) -> VOGN:
        defaults: dict[str, Any] = {
            "data_size": 100,
            "lr": 0.05,
            "hess_init": 0.5,
            "decay": 0.9,
            **PLAIN,
            "backend": "loop",
            "generator": generator_of(2),
        }
        return VOGN(model, cross_entropy, **(defaults | settings))

    return make


@pytest.fixture
def vogn(model: nn.Module, make_vogn: Callable[..., VOGN]) -> VOGN:
    return make_vogn(model)


@pytest.fixture
def train(batch: tuple[Tensor, Tensor]) -> Callable[..., None]:
    """Take some training steps on the batch."""

    def train(optimizer: VOGN, steps: int = 3) -> None:
        for _ in range(steps):
            optimizer.observe(*batch)
            optimizer.step()

    return train


@pytest.fixture
def mean_of() -> Callable[[nn.Module], list[Tensor]]:
    return lambda model: [p.detach().clone() for p in model.parameters()]


@pytest.fixture
def same() -> Callable[[list[Tensor], list[Tensor]], bool]:
    """Whether all tensors are equal, bit for bit."""
    return lambda first, second: all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
