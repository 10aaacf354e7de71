"""The training loop, the same for Adam and VOGN."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from persample import VOGN, losses
from persample.errors import NonFiniteLossError
from persample.experiments.checkpoint import restore, save
from persample.experiments.config import TrainConfig
from persample.experiments.data import ImageDataset
from persample.experiments.evaluate import evaluate
from persample.experiments.records import Record
from persample.experiments.run import Run, start
from persample.experiments.seeds import make_generator


class Watcher(Protocol):
    """What is told how a run goes, for example to show it."""

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


def train(
    config: TrainConfig,
    dataset: ImageDataset,
    checkpoint: Path,
    *,
    resume: bool = False,
    watcher: Watcher | None = None,
) -> Run:
    """Train a model, and measure it on training and test data after every epoch.

    A run that was interrupted and resumed ends, bit for bit, as one that was not.

    Args:
        config: The settings.
        dataset: The data.
        checkpoint: A file that is replaced after every epoch by the state of the run; its folder exists.
        resume: Go on from the state in `checkpoint`.
        watcher: Is told of every batch and epoch.

    Returns:
        The run with all its epochs done.

    Raises:
        NonFiniteLossError: The training diverged.
        DataError: There is nothing to resume, or it cannot be read.
        OptionError: A setting is not allowed, or not the one of the run to resume.
    """
    watcher = watcher or SilentWatcher()
    run = start(config, len(dataset.train_targets))
    if resume:
        restore(run, checkpoint)
        watcher.on_epoch(config, run.epoch, run.records)
    while run.epoch < config.epochs:
        _train_epoch(run, dataset, watcher)
        run.epoch += 1
        run.records += evaluate(run, dataset)
        save(run, checkpoint)
        watcher.on_epoch(config, run.epoch, run.records)
    return run


def _train_epoch(run: Run, dataset: ImageDataset, watcher: Watcher) -> None:
    config, epoch = run.config, run.epoch + 1
    generator = make_generator(config.seed, "order", epoch)
    batches = torch.randperm(len(dataset.train_targets), generator=generator).split(config.batch_size)
    for index, rows in enumerate(batches):
        lr = learning_rate(config, run.epoch * len(batches) + index, config.epochs * len(batches))
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        loss = _train_step(run, dataset.train_inputs[rows], dataset.train_targets[rows]).item()
        if not math.isfinite(loss):
            raise NonFiniteLossError(
                f"the training loss of {config.optimizer} became {loss} in epoch {epoch}: the training diverged; "
                f"use a learning rate below {config.settings.lr}"
            )
        watcher.on_batch(config, epoch, index + 1, len(batches), loss)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Return the learning rate of a step, counted from 0, of a run of `steps`.

    "constant" is α; "cosine" is α (1 + cos(π step / steps)) / 2.
    """
    if config.schedule == "constant":
        return config.settings.lr
    return config.settings.lr * (1 + math.cos(math.pi * step / steps)) / 2


def _train_step(run: Run, inputs: Tensor, targets: Tensor) -> Tensor:
    optimizer = run.optimizer
    if isinstance(optimizer, VOGN):
        loss = optimizer.observe(inputs, targets)
        optimizer.step()
        return loss
    optimizer.zero_grad()
    loss = losses.cross_entropy(run.model(inputs), targets).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach()
