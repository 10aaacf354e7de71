"""Processes that train by Accelerate, and beside it by a plain loop over the same batches; a test starts them.

python -m torch.distributed.run --standalone --nproc-per-node 2 accelerate_ranks.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import persample
from persample.integrations.accelerate import sampled_params
from persample.testing.devices import generator_of

PARTS = 2  # batches per step


def make_optimizer() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    return persample.VOGN(model, data_size=40, lr=0.05, generator=generator_of(3), process_group=dist.group.WORLD)


def by_accelerate(accelerator: Any) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    """Train for two epochs; return the optimizer, and the batches that this process saw."""
    g = generator_of(1)
    data = TensorDataset(torch.randn(40, 4, generator=g), torch.randint(3, (40,), generator=g))
    optimizer = make_optimizer()
    prepared, loader = accelerator.prepare(optimizer, DataLoader(data, 5))
    seen = []
    for _ in range(2):
        for inputs, targets in loader:
            with accelerator.accumulate(optimizer.model):
                with sampled_params(accelerator, prepared):
                    accelerator.backward(F.cross_entropy(optimizer.model(inputs), targets))
                prepared.step()
                prepared.zero_grad()
            seen.append((inputs, targets))
    return optimizer, seen


def by_hand(batches: list[tuple[Tensor, Tensor]]) -> Any:
    """Train on these batches, `PARTS` of them per step as one."""
    optimizer = make_optimizer()
    for first in range(0, len(batches), PARTS):
        inputs, targets = (torch.cat(parts) for parts in zip(*batches[first : first + PARTS], strict=True))
        with optimizer.sampled_params(train=True):
            F.cross_entropy(optimizer.model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


if __name__ == "__main__":
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=PARTS)
    optimizer, batches = by_accelerate(accelerator)
    runs = {"accelerate": optimizer, "hand": by_hand(batches)}
    found = {f"{name} {n}": t for name, run in runs.items() for n, t in run.posterior.mean.items()}
    found |= {f"{name} precision {n}": t for name, run in runs.items() for n, t in run.posterior.precision.items()}
    seen = torch.cat([inputs for inputs, _ in batches])
    torch.save(found | {"seen": seen, "steps": optimizer.steps}, Path(sys.argv[1]) / f"{accelerator.process_index}.pt")
    accelerator.end_training()
