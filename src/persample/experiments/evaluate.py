"""Measuring a model after an epoch, without affecting its training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from persample import VOGN
from persample.experiments.config import VognSettings
from persample.experiments.data import ImageDataset
from persample.experiments.metrics import evaluate_probabilities
from persample.experiments.records import Prediction, Record, Split
from persample.experiments.run import Run
from persample.experiments.seeds import make_generator

_CHUNK = 500


def evaluate(run: Run, dataset: ImageDataset) -> list[Record]:
    """Return the metrics on training and held-out data after the epochs done.

    With VOGN both at the posterior's mean and with probabilities averaged over draws from the posterior. The
    draws come from a generator of their own, so that the training goes on as if nothing had been measured.

    Args:
        run: The run.
        dataset: The data.
    """
    parts: dict[Split, tuple[Tensor, Tensor]] = {
        "train": (dataset.train_inputs, dataset.train_targets),
        dataset.held_out: (dataset.test_inputs, dataset.test_targets),
    }
    run.model.eval()
    records = []
    for split, (inputs, targets) in parts.items():
        for prediction, probabilities in _predictions(run, split, inputs).items():
            metrics = evaluate_probabilities(probabilities, targets)
            records.append(Record(run.config.optimizer, run.epoch, split, prediction, metrics))
    run.model.train()
    return records


def _predictions(run: Run, split: Split, inputs: Tensor) -> dict[Prediction, Tensor]:
    at_parameters = predict(run.model, inputs)
    settings = run.config.settings
    if not isinstance(settings, VognSettings) or not isinstance(run.optimizer, VOGN):
        return {"point": at_parameters}
    draws = settings.train_draws if split == "train" else settings.test_draws
    return {
        "mean": at_parameters,
        "averaged": predict_averaged(run.optimizer, inputs, draws, run.config.seed, run.epoch),
    }


@torch.no_grad()
def predict(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return class probabilities (N, K) in float64 at the model's parameters as they are."""
    return torch.cat([model(chunk).double().softmax(1) for chunk in inputs.split(_CHUNK)])


def predict_averaged(optimizer: VOGN, inputs: Tensor, draws: int, seed: int, epoch: int) -> Tensor:
    """Return class probabilities (N, K) averaged over draws from the posterior, the same draws for all inputs.

    Args:
        optimizer: Holds the posterior.
        inputs: (N, …).
        draws: How many draws.
        seed: The run's seed.
        epoch: With the seed, what the draws are derived from.
    """
    generator = make_generator(seed, "evaluation", epoch)
    predicted: Tensor = optimizer.predict(inputs, samples=draws, generator=generator, rows_at_once=_CHUNK).probabilities
    return predicted
