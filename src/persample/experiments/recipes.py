"""The default settings for each data set."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from persample.errors import OptionError
from persample.experiments.config import AdamSettings, Schedule, TrainConfig, VognSettings


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings for one data set, those of `TrainConfig` for both optimizers."""

    epochs: int
    batch_size: int
    schedule: Schedule
    evaluate_every: int = 1
    adam: AdamSettings
    vogn: VognSettings


RECIPES = {
    "mnist-5k": Recipe(
        epochs=20,
        batch_size=64,
        schedule="cosine",
        adam=AdamSettings(lr=2e-3),
        vogn=VognSettings(lr=0.05, prior_precision=30.0, decay=0.999, hess_init=0.3, momentum=0.9, temperature=0.5),
    ),
    "mnist": Recipe(
        epochs=20,
        batch_size=128,
        schedule="cosine",
        evaluate_every=2,
        adam=AdamSettings(lr=2e-3),
        vogn=VognSettings(lr=1e-2, prior_precision=5.0, decay=0.999, hess_init=0.05, momentum=0.9, temperature=0.3),
    ),
    "fashion-mnist": Recipe(
        epochs=20,
        batch_size=128,
        schedule="cosine",
        evaluate_every=2,
        adam=AdamSettings(lr=4e-3),
        vogn=VognSettings(lr=1e-2, prior_precision=25.0, decay=0.999, hess_init=0.05, momentum=0.9, temperature=0.3),
    ),
    "cifar10": Recipe(
        epochs=24,
        batch_size=128,
        schedule="cosine",
        evaluate_every=3,
        adam=AdamSettings(lr=1e-3),
        vogn=VognSettings(lr=1e-2, prior_precision=100.0, decay=0.999, hess_init=0.05, momentum=0.9, temperature=0.4),
    ),
}


def configure(dataset: str, optimizer: str, seed: int = 0, **changes: Any) -> TrainConfig:
    """Return the data set's recipe with changes.

    Args:
        dataset: The name of the data set.
        optimizer: "adam" or "vogn".
        seed: The seed of the run.
        changes: Any fields of `TrainConfig` and of the optimizer's settings. None leaves a field as it is.

    Returns:
        The settings of the run.

    Raises:
        OptionError: A name is unknown, the optimizer has no such setting, or a value is not allowed.
    """
    if dataset not in RECIPES:
        raise OptionError(f"no data set is called {dataset!r}; choose one of {', '.join(RECIPES)}")
    if optimizer not in ("adam", "vogn"):
        raise OptionError(f"no optimizer is called {optimizer!r}; choose adam or vogn")
    recipe = RECIPES[dataset]
    settings: AdamSettings | VognSettings = getattr(recipe, optimizer)
    given = {name: value for name, value in changes.items() if value is not None}
    own = {field.name for field in fields(settings)}
    run = {"epochs", "batch_size", "schedule", "validation", "evaluate_every"}
    if unknown := given.keys() - own - run:
        raise OptionError(
            f"{optimizer} has no setting {', '.join(sorted(unknown))}; it has {', '.join(sorted(own | run))}"
        )
    base = TrainConfig(
        dataset=dataset,
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        schedule=recipe.schedule,
        evaluate_every=recipe.evaluate_every,
        seed=seed,
        settings=replace(settings, **{name: given[name] for name in given.keys() & own}),
    )
    return replace(base, **{name: given[name] for name in given.keys() & run})
