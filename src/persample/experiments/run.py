"""A training run in memory: the model, its optimizer, and the metrics so far."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from persample import VOGN, losses
from persample.experiments import processes
from persample.experiments.config import AdamSettings, TrainConfig
from persample.experiments.layers import LayerRecord
from persample.experiments.models import model_for
from persample.experiments.records import Record
from persample.experiments.seeds import derive_seed, make_generator


@dataclass
class Run:
    """A training run between two epochs.

    Attributes:
        config: Its settings.
        model: The network. With VOGN its parameters are the posterior's mean.
        optimizer: Adam, or VOGN.
        epoch: How many epochs are done.
        records: The metrics after each of them.
        layers: How the training went in each of them, parameter by parameter; empty without a posterior.
    """

    config: TrainConfig
    model: nn.Module
    optimizer: torch.optim.Adam | VOGN
    epoch: int = 0
    records: list[Record] = field(default_factory=list)
    layers: list[LayerRecord] = field(default_factory=list)


def start(config: TrainConfig, data_size: int) -> Run:
    """Begin a run; with equal seeds, both optimizers start from the same weights.

    Args:
        config: Its settings.
        data_size: The number of training samples.

    Raises:
        PersampleError: A setting is not allowed, or the backend cannot be used.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "weights"))
        model = model_for(config.dataset)
    settings = config.settings
    if isinstance(settings, AdamSettings):
        return Run(config, model, torch.optim.Adam(model.parameters(), lr=settings.lr))
    optimizer = VOGN(
        model,
        losses.cross_entropy,
        data_size=data_size,
        **settings.of_optimizer(),
        # So that a run repeats bit for bit, resumed or not.
        backend_options={"deterministic": True} if settings.backend == "fused" else None,
        generator=make_generator(config.seed, "noise"),
        process_group=processes.group(),
    )
    return Run(config, model, optimizer)
