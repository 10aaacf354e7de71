"""Accelerate's prepared optimizer, in the loop that its users write."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import persample
from persample.errors import UsageError
from persample.integrations.accelerate import sampled_params
from persample.testing.devices import generator_of

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")

GENERATOR = generator_of(1)
X, Y = torch.randn(50, 4, generator=GENERATOR), torch.randint(3, (50,), generator=GENERATOR)


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """Accelerate keeps its state in classes."""
    yield
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()


def train(
    rule: Any,
    batch_size: int,
    parts: int,
    *,
    clip: float | None = None,
    optimizer_type: Any = None,
    scaler: Any = None,
) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=parts)
    accelerator.scaler = scaler
    optimizer = (
        rule(model, data_size=50, lr=0.05, generator=generator_of(3))
        if optimizer_type is None
        else optimizer_type(model.parameters())
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    loader = DataLoader(TensorDataset(X, Y), batch_size)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    for _ in range(2):
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                with sampled_params(accelerator, optimizer):
                    loss = F.cross_entropy(model(inputs), targets)
                    accelerator.backward(loss)
                if accelerator.sync_gradients and clip is not None:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return optimizer.optimizer


def assert_same(one: Any, other: Any, **tolerances: float) -> None:
    assert one.steps == other.steps
    for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, **({"rtol": 1e-4, "atol": 1e-6} | tolerances))
    torch.testing.assert_close(one._precision(), other._precision(), **({"rtol": 1e-4, "atol": 1e-6} | tolerances))


@pytest.mark.parametrize("rule", [persample.VOGN, persample.IVON, persample.Vadam])
@pytest.mark.parametrize(("whole", "part", "parts"), [(20, 5, 4), (16, 8, 2), (24, 8, 3)])
def test_accumulated_batches_are_one_large_batch(rule: Any, whole: int, part: int, parts: int) -> None:
    """Also at the end of an epoch, where there are fewer parts, and the last one is smaller."""
    assert_same(train(rule, whole, 1), train(rule, part, parts))


def test_the_accumulated_gradient_can_be_clipped() -> None:
    one, other = train(persample.VOGN, 25, 1, clip=0.05), train(persample.VOGN, 5, 5, clip=0.05)
    assert_same(one, other)
    unclipped = train(persample.VOGN, 25, 1)
    assert (one.model[0].weight - unclipped.model[0].weight).abs().max() > 1e-3


@pytest.mark.parametrize("parts", [1, 5])
def test_a_gradient_scaler(parts: int) -> None:
    """Accelerate makes one for GPUs only, so it gets one here."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert_same(train(persample.VOGN, 25 // parts, parts, scaler=scaler), train(persample.VOGN, 25, 1), rtol=1e-3)


def test_an_optimizer_of_others_is_refused() -> None:
    with pytest.raises(UsageError, match=r"Adam, which does not train a posterior.*persample\.VOGN"):
        train(None, 10, 1, optimizer_type=torch.optim.Adam)


def test_accelerates_own_checkpoints(tmp_path: Any) -> None:
    def prepared() -> tuple[Any, Any, Any]:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        accelerator = accelerate.Accelerator(cpu=True)
        optimizer = persample.VOGN(model, data_size=50, lr=0.05)
        return accelerator, *accelerator.prepare(model, optimizer)

    def run(accelerator: Any, model: Any, optimizer: Any, steps: int) -> None:
        for _ in range(steps):
            with sampled_params(accelerator, optimizer):
                accelerator.backward(F.cross_entropy(model(X), Y))
            optimizer.step()
            optimizer.zero_grad()

    whole = prepared()
    run(*whole, steps=2)
    whole[0].save_state(str(tmp_path))
    run(*whole, steps=2)
    resumed = prepared()
    resumed[0].load_state(str(tmp_path))
    run(*resumed, steps=2)
    assert_same(whole[2].optimizer, resumed[2].optimizer, rtol=0, atol=0)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed")
def test_two_processes_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    """Both hold the same posterior: that of the same batches and draws without Accelerate."""
    script = Path(__file__).with_name("accelerate_ranks.py")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run(
        [*start, str(script), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ran.returncode == 0, ran.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first["steps"] == second["steps"] == 4
    assert not torch.equal(first.pop("seen"), second.pop("seen"))
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=0)
        torch.testing.assert_close(value, first[name.replace("accelerate", "hand")], rtol=1e-4, atol=1e-6)
