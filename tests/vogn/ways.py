"""The three ways to observe a batch with any optimizer and backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persample import backends, losses
from persample.testing.devices import generator_of
from persample.vogn import IVON, OGN, VOGN, MeanFieldVI, Vadam, VariationalOptimizer

Batch = tuple[Tensor, Tensor]
Observe = Callable[[VariationalOptimizer, Tensor, Tensor], Any]

# Settings of VOGN under which a step is that of Algorithm 1, whose terms a test can tell apart.
PLAIN: dict[str, Any] = {"momentum": 0.0, "temperature": 1.0, "prior_precision": 1.0}

RECORDING = ["loop", "vmap", "fused", "hooks", "backpack", "opacus"]
RULES = [VOGN, OGN, IVON, Vadam, MeanFieldVI]
RULES_AND_BACKENDS = [*((VOGN, backend) for backend in RECORDING), (IVON, ""), (Vadam, ""), (MeanFieldVI, "")]


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def make(rule: Any = VOGN, backend: str = "fused", model: nn.Module | None = None, **settings: Any) -> Any:
    if rule in (VOGN, OGN):
        if problem := backends()[backend].problem:
            pytest.skip(problem)
        settings = {"backend": backend, "hess_init": 0.5, **PLAIN, **settings}
    defaults = {"data_size": 100, "lr": 0.01, "generator": generator_of(2)}
    return rule(model or network(), losses.cross_entropy, **(defaults | settings))


def by_observing(optimizer: VariationalOptimizer, x: Tensor, y: Tensor) -> Any:
    optimizer.observe(x, y)
    optimizer.step()


def by_context(optimizer: VariationalOptimizer, x: Tensor, y: Tensor) -> Any:
    for _ in range(optimizer.mc_samples):
        with optimizer.sampled_params(train=True):
            F.cross_entropy(optimizer.model(x), y).backward()
    optimizer.step()


def by_closure(optimizer: VariationalOptimizer, x: Tensor, y: Tensor) -> Any:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(optimizer.model(x), y)
        loss.backward()
        return loss

    return optimizer.step(closure)
