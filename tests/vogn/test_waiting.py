"""Where a step reads a value, a GPU must be waited for: found without one, by the operations that tell Python one."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import persample
from persample.kernels.compiled import without_kernels

#: Not by its name, which that of the checkout may be, too.
PACKAGE = Path(persample.__file__).parent

#: Operations whose results Python reads, or whose shape depends on values.
WAITING = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero"}


class Waits(TorchDispatchMode):
    """Notes the function of the package from which such an operation was called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.removeprefix("aten::") in WAITING:
            own = [frame for frame in traceback.extract_stack() if PACKAGE in Path(frame.filename).parents]
            self.found.append(own[-1].name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _as_on_a_gpu() -> Iterator[None]:
    """Without the kernels of CPUs, in which nothing is seen."""
    with without_kernels():
        yield


def waits_in(call: Callable[[], object]) -> list[str]:
    with Waits() as waits:
        call()
    return waits.found


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear layers": (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), (4,)),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)
        ),
        (1, 8, 8),
    ),
    "attention": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), nn.Flatten(), nn.Linear(40, 3)
        ),
        (5, 8),
    ),
}


class Positions(nn.Module):
    """Looks up embeddings of its positions."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.head = nn.Embedding(7, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((x + self.positions(torch.arange(x.shape[1], device=x.device))).mean(1))


@pytest.mark.parametrize("name", MODELS)
def test_a_step_waits_for_its_losses_and_once_for_its_result(name: str) -> None:
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model, inputs, targets = build(), torch.randn(6, *shape), torch.randint(3, (6,))
    vogn = persample.VOGN(model, persample.losses.cross_entropy, data_size=60, lr=0.01, hess_init=0.5)
    for _ in range(3):  # checks, chooses forms, remembers where the samples are
        vogn.observe(inputs, targets)
        vogn.step()
    assert waits_in(lambda: vogn.observe(inputs, targets)) == ["require_losses"]
    assert waits_in(vogn.step) == ["first_non_finite"]


def test_positions_are_looked_at_on_a_cpu_alone() -> None:
    torch.manual_seed(0)
    model, inputs, targets = Positions(), torch.randn(6, 5, 8), torch.randint(3, (6,))
    source = persample.make_source("fused", model, persample.losses.cross_entropy, check="never")
    for _ in range(3):
        source.moments(inputs, targets)
    looked = ["_moves"] if inputs.device.type == "cpu" else []
    assert waits_in(lambda: source.moments(inputs, targets)) == [*looked, "require_losses"]
