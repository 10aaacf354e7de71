"""The settings that each method may try, and the training budget.

All methods have the same number of trials on a data set; what is tried lies around values that are known to work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The budget of all trainings on one data set.

    Attributes:
        epochs: Passes over the data.
        batch_size: Samples per step.
        held_out: Training samples that trials are measured on.
        samples: How many samples to keep of each part of the data; None is all.
    """

    epochs: int
    batch_size: int
    held_out: int
    samples: int | None = None


BUDGETS: Mapping[str, Budget] = {
    "cifar10": Budget(epochs=40, batch_size=256, held_out=5000),
    "mnist": Budget(epochs=15, batch_size=128, held_out=5000),
}

#: For a rehearsal of everything within a minute.
SMALL: Mapping[str, Budget] = {name: Budget(epochs=1, batch_size=40, held_out=40, samples=120) for name in BUDGETS}


def _grid(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """Return all combinations."""
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


_PRECISIONS = ["marginal likelihood", 30.0, 100.0, 300.0, 1000.0, 3000.0]

TRIALS: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]] = {
    "cifar10": {
        "VOGN": _grid(lr=[0.04, 0.07, 0.12], prior_precision=[100.0], temperature=[0.3, 0.45], hess_init=[0.1]),
        "IVON": _grid(lr=[0.1, 0.3], hess_init=[0.01, 0.03, 0.1], prior_precision=[20.0]),
        "Vadam": _grid(lr=[1e-3], prior_precision=[1e3, 1e4], temperature=[1e-4, 3e-4, 1e-3]),
        "SWAG": _grid(lr=[1e-3, 3e-3], swa_lr=[3e-4, 6e-4, 1e-3]),
        "MC dropout": _grid(lr=[1e-3, 2e-3], rate=[0.05, 0.1, 0.2]),
        "AdamW": _grid(lr=[1e-3, 2e-3], weight_decay=[0.1, 0.3, 1.0]),
        "Adam": _grid(lr=[2e-4, 3e-4, 5e-4, 1e-3, 2e-3, 4e-3]),
        "Laplace": _grid(prior_precision=_PRECISIONS),
        "Laplace, last layer": _grid(prior_precision=_PRECISIONS),
    },
    "mnist": {
        "VOGN": _grid(lr=[0.006, 0.012], prior_precision=[5.0], temperature=[0.15, 0.3, 0.5], hess_init=[0.05]),
        "IVON": _grid(lr=[0.1, 0.3, 1.0], hess_init=[0.1, 0.3], prior_precision=[5.0]),
        "Vadam": _grid(lr=[1e-3], prior_precision=[1e2, 1e3], temperature=[3e-4, 1e-3, 3e-3]),
        "SWAG": _grid(lr=[1e-3, 3e-3], swa_lr=[3e-4, 6e-4, 1e-3]),
        "MC dropout": _grid(lr=[2e-3, 4e-3], rate=[0.05, 0.1, 0.2]),
        "AdamW": _grid(lr=[2e-3, 4e-3], weight_decay=[0.1, 0.3, 1.0]),
        "Adam": _grid(lr=[5e-4, 1e-3, 2e-3, 3e-3, 4e-3, 6e-3]),
        "Laplace": _grid(prior_precision=_PRECISIONS),
        "Laplace, last layer": _grid(prior_precision=_PRECISIONS),
    },
}
