from __future__ import annotations

import pytest

from persample.errors import OptionError
from persample.experiments.config import AdamSettings, TrainConfig, VognSettings

RUN = {"dataset": "mnist", "epochs": 2, "batch_size": 3, "schedule": "cosine", "seed": 4}


def test_as_dict_has_all_settings_in_one_level() -> None:
    config = TrainConfig(**RUN, settings=AdamSettings(lr=0.5))

    assert config.as_dict() == {"optimizer": "adam", **RUN, "validation": 0, "evaluate_every": 1, "lr": 0.5}


def test_the_settings_say_which_optimizer_it_is() -> None:
    settings = VognSettings(lr=0.1, prior_precision=1, decay=0.9, hess_init=0.1)

    assert TrainConfig(**RUN, settings=settings).optimizer == "vogn"


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", 0), ("batch_size", 0), ("seed", -1), ("validation", -1), ("evaluate_every", 0), ("schedule", "linear")],
)
def test_refuses_impossible_runs(name: str, value: object) -> None:
    with pytest.raises(OptionError, match=f"^{name}='?{value}'? must be"):
        TrainConfig(**RUN | {name: value}, settings=AdamSettings(lr=0.5))


@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan")])
def test_refuses_impossible_learning_rates(lr: float) -> None:
    with pytest.raises(OptionError, match=f"^lr={lr} must be above 0"):
        AdamSettings(lr=lr)


@pytest.mark.parametrize("name", ["train_draws", "test_draws"])
def test_refuses_to_average_over_nothing(name: str) -> None:
    with pytest.raises(OptionError, match=f"^{name}=0 must be at least 1"):
        VognSettings(lr=0.1, prior_precision=1, decay=0.9, hess_init=0.1, **{name: 0})
