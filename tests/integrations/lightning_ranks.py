"""Processes that Lightning trains together, and beside them a plain loop over the same batches; a test starts them.

python -m torch.distributed.run --standalone --nproc-per-node 2 lightning_ranks.py FOLDER
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import persample
from persample.integrations.lightning import DrawWeights
from persample.testing.devices import generator_of

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
PARTS = 2  # batches per step


class Net(lightning.LightningModule):
    def __init__(self, *, known: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.known = known
        self.seen: list[tuple[Tensor, Tensor]] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.seen.append((batch[0], batch[1]))
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        self.posterior.predict(batch[0], samples=2, generator=generator_of(0))

    def configure_optimizers(self) -> Any:
        group = dist.group.WORLD if self.known else None
        self.posterior = persample.VOGN(
            self.model, data_size=40, lr=0.05, generator=generator_of(3), process_group=group
        )
        return self.posterior


def by_lightning(net: Net) -> Net:
    """Train for two epochs."""
    g = generator_of(1)
    data = TensorDataset(torch.randn(40, 4, generator=g), torch.randint(3, (40,), generator=g))
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        accumulate_grad_batches=PARTS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[DrawWeights()],
    )
    trainer.fit(net, DataLoader(data, 5), DataLoader(data, 5))
    return net


def by_hand(batches: list[tuple[Tensor, Tensor]]) -> Any:
    """Train on these batches, `PARTS` of them per step as one."""
    net = Net()
    optimizer = net.configure_optimizers()
    for first in range(0, len(batches), PARTS):
        inputs, targets = (torch.cat(parts) for parts in zip(*batches[first : first + PARTS], strict=True))
        with optimizer.sampled_params(train=True):
            F.cross_entropy(net.model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


if __name__ == "__main__":
    net = by_lightning(Net())
    runs = {"lightning": net.posterior, "hand": by_hand(net.seen)}
    found: dict[str, Any] = {f"{name} {n}": t for name, run in runs.items() for n, t in run.posterior.mean.items()}
    found |= {f"{name} precision {n}": t for name, run in runs.items() for n, t in run.posterior.precision.items()}
    seen = torch.cat([inputs for inputs, _ in net.seen])
    try:
        by_lightning(Net(known=False))
    except persample.PersampleError as error:
        found["error"] = str(error)
    torch.save(found | {"seen": seen, "steps": net.posterior.steps}, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
