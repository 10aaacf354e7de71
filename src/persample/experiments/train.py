"""The training loop, the same for Adam and VOGN."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from persample import VOGN, losses
from persample.errors import NonFiniteLossError
from persample.experiments import processes
from persample.experiments.checkpoint import save
from persample.experiments.config import TrainConfig
from persample.experiments.data import ImageDataset
from persample.experiments.evaluate import evaluate
from persample.experiments.layers import layer_records
from persample.experiments.records import Record
from persample.experiments.run import Run
from persample.experiments.seeds import make_generator


class Watcher(Protocol):
    """Receives the progress of a run, for example to show it."""

    def on_batch(self, config: TrainConfig, epoch: int, batch: int, batches: int, loss: float) -> None:
        """A batch was trained: the `batch`-th of `batches` in this epoch, both counted from 1."""

    def on_epoch(self, config: TrainConfig, epoch: int, records: list[Record]) -> None:
        """An epoch is trained, evaluated and saved; `records` are all of the run so far."""


class SilentWatcher:
    """A watcher that does nothing."""

    def on_batch(self, config: TrainConfig, epoch: int, batch: int, batches: int, loss: float) -> None:
        """Do nothing."""

    def on_epoch(self, config: TrainConfig, epoch: int, records: list[Record]) -> None:
        """Do nothing."""


def train(run: Run, dataset: ImageDataset, checkpoint: Path, watcher: Watcher | None = None) -> None:
    """Train until all epochs are done, measuring on training and held-out data.

    A run that was interrupted, and restored from its checkpoint, ends bit for bit as one that was not. Nothing
    but the run is changed, torch's global random generator included. Of several processes each trains on its share of
    every batch, and the first one measures, saves and tells.

    Args:
        run: A run that was just started, or restored.
        dataset: The data.
        checkpoint: A file that is replaced after every epoch by the state of the run; its folder exists.
        watcher: Is told of every batch and epoch; first of the epochs that were done before.

    Raises:
        NonFiniteLossError: The training diverged.
    """
    watcher = watcher or SilentWatcher()
    if run.epoch > 0:
        watcher.on_epoch(run.config, run.epoch, run.records)
    while run.epoch < run.config.epochs:
        _train_epoch(run, dataset, watcher)
        run.epoch += 1
        if not processes.is_first():
            continue
        if run.epoch % run.config.evaluate_every == 0 or run.epoch == run.config.epochs:
            run.records += evaluate(run, dataset)
        run.layers += layer_records(run.config.optimizer, run.epoch, run.optimizer)
        save(run, checkpoint)
        watcher.on_epoch(run.config, run.epoch, run.records)


def _train_epoch(run: Run, dataset: ImageDataset, watcher: Watcher) -> None:
    config, epoch = run.config, run.epoch + 1
    batches = shuffled_batches(config, epoch, len(dataset.train_targets))
    for index, rows in enumerate(batches):
        lr = learning_rate(config, run.epoch * len(batches) + index, config.epochs * len(batches))
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        loss = _train_step(run, dataset, rows).item()
        if not math.isfinite(loss):
            raise NonFiniteLossError(
                f"the training loss of {config.optimizer} became {loss} in epoch {epoch}: training diverged; use a "
                f"learning rate below {config.settings.lr}"
            )
        watcher.on_batch(config, epoch, index + 1, len(batches), loss)


def shuffled_batches(config: TrainConfig, epoch: int, data_size: int) -> tuple[Tensor, ...]:
    """Return the rows of each batch of an epoch, in an order that depends on seed and epoch alone.

    Args:
        config: Settings with the seed and the batch size.
        epoch: The epoch, from 1.
        data_size: The number of training samples.

    Returns:
        Tensors of row numbers, each of the batch size but the last, which has what remains.
    """
    generator = make_generator(config.seed, "order", epoch)
    batches: tuple[Tensor, ...] = torch.randperm(data_size, generator=generator).split(config.batch_size)
    return batches


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Return the learning rate of a step, counted from 0, of a run of `steps`.

    "constant" is α; "cosine" is α (1 + cos(π step / steps)) / 2.
    """
    if config.schedule == "constant":
        return config.settings.lr
    return config.settings.lr * (1 + math.cos(math.pi * step / steps)) / 2


def _train_step(run: Run, dataset: ImageDataset, rows: Tensor) -> Tensor:
    """Train one batch, and return the mean loss of this process's share of it."""
    own = processes.own_share(rows)
    inputs, targets = dataset.train_inputs[own], dataset.train_targets[own]
    optimizer = run.optimizer
    if isinstance(optimizer, VOGN):
        loss = optimizer.observe(inputs, targets) if len(own) else torch.zeros(())
        optimizer.step()
        return loss
    optimizer.zero_grad()
    total = losses.cross_entropy(run.model(inputs), targets).sum()
    (total / len(rows)).backward()
    processes.add_up(p.grad for p in run.model.parameters() if p.grad is not None)
    optimizer.step()
    return total.detach() / max(1, len(own))
