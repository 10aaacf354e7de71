"""The settings of a training run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from persample.errors import OptionError
from persample.experiments.records import OptimizerName

Schedule = Literal["constant", "cosine"]
SCHEDULES: tuple[Schedule, ...] = ("constant", "cosine")


@dataclass(frozen=True, kw_only=True)
class AdamSettings:
    """Settings of `torch.optim.Adam`.

    Attributes:
        lr: The learning rate.
    """

    lr: float

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise OptionError(f"lr={self.lr} must be above 0")


@dataclass(frozen=True, kw_only=True)
class VognSettings:
    """Settings of `persample.VOGN`, and of the predictions that are averaged over its posterior.

    Attributes:
        lr: See `persample.VOGN`, as for those that follow.
        prior_precision: See `persample.VOGN`.
        decay: See `persample.VOGN`.
        hess_init: See `persample.VOGN`.
        momentum: See `persample.VOGN`.
        damping: See `persample.VOGN`.
        temperature: See `persample.VOGN`.
        temperature_start: See `persample.VOGN`.
        temperature_steps: See `persample.VOGN`.
        mc_samples: See `persample.VOGN`.
        order: See `persample.VOGN`.
        backend: The source of the per-sample gradients, one of `persample.backends()`.
        train_draws: Draws from the posterior that predictions on the training data are averaged over.
        test_draws: The same on the test data, or on the data held out for validation.
    """

    lr: float
    prior_precision: float
    decay: float
    hess_init: float
    momentum: float = 0.0
    damping: float = 0.0
    temperature: float = 1.0
    temperature_start: float = 0.01
    temperature_steps: int = 0
    mc_samples: int = 1
    order: Literal["printed", "updated"] = "printed"
    backend: str = "fused"
    train_draws: int = 4
    test_draws: int = 32

    def __post_init__(self) -> None:
        for name in ("train_draws", "test_draws"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)} must be at least 1")

    def of_optimizer(self) -> dict[str, Any]:
        """Return the settings that are keyword arguments of `persample.VOGN`."""
        return {name: value for name, value in asdict(self).items() if name not in ("train_draws", "test_draws")}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of a training run: runs with equal settings end with equal weights.

    Attributes:
        dataset: Name of the data set; it determines the model.
        epochs: Passes over the training data.
        batch_size: Samples per step; the last batch of an epoch may be smaller.
        schedule: "constant", or "cosine" for a learning rate that falls to 0 over the run along half a cosine.
        seed: What the first weights, the order of the data and all noise are derived from.
        validation: How many training samples are held out, drawn by the seed, and measured in place of the test data,
            which then stay unseen; 0 trains on all.
        evaluate_every: The metrics are measured after every so many epochs, and after the last one.
        settings: The optimizer's settings, whose type says which optimizer it is.
    """

    dataset: str
    epochs: int
    batch_size: int
    schedule: Schedule
    seed: int
    validation: int = 0
    evaluate_every: int = 1
    settings: AdamSettings | VognSettings

    def __post_init__(self) -> None:
        for name, least in {"epochs": 1, "batch_size": 1, "seed": 0, "validation": 0, "evaluate_every": 1}.items():
            if getattr(self, name) < least:
                raise OptionError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.schedule not in SCHEDULES:
            raise OptionError(f"schedule={self.schedule!r} must be one of {', '.join(SCHEDULES)}")

    @property
    def optimizer(self) -> OptimizerName:
        """The name of the optimizer."""
        return "adam" if isinstance(self.settings, AdamSettings) else "vogn"

    def as_dict(self) -> dict[str, str | int | float]:
        """Return all settings by name, in one level."""
        run = asdict(self)
        settings: dict[str, str | int | float] = run.pop("settings")
        return {"optimizer": self.optimizer} | run | settings
