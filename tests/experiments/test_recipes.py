from __future__ import annotations

import pytest

from persample.errors import OptionError
from persample.experiments.data import DATASET_NAMES
from persample.experiments.recipes import RECIPES, configure

DATA_SIZES = {"mnist-5k": 4_000, "mnist": 60_000, "fashion-mnist": 60_000, "cifar10": 50_000}


@pytest.mark.parametrize("dataset", DATASET_NAMES)
def test_every_data_set_has_a_recipe_whose_first_step_is_safe(dataset: str) -> None:
    vogn = RECIPES[dataset].vogn

    assert vogn.lr / (vogn.hess_init + vogn.prior_precision / DATA_SIZES[dataset]) < 0.5


def test_changes_reach_the_run_and_the_optimizer() -> None:
    config = configure("mnist", "vogn", 7, epochs=3, backend="vmap", lr=None)

    assert (config.dataset, config.seed, config.epochs) == ("mnist", 7, 3)
    assert config.settings.backend == "vmap"
    assert config.settings.lr == RECIPES["mnist"].vogn.lr
    assert config.batch_size == RECIPES["mnist"].batch_size


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (("svhn", "adam"), {}, "'svhn'; choose one of mnist-5k, mnist, fashion-mnist, cifar10"),
        (("mnist", "sgd"), {}, "'sgd'; choose adam or vogn"),
        (
            ("mnist", "adam"),
            {"momentum": 0.9},
            "adam has no setting momentum; it has batch_size, epochs, evaluate_every, lr",
        ),
        (("mnist", "vogn"), {"epochs": 0}, "epochs=0 must be at least 1"),
    ],
)
def test_refuses_what_does_not_exist(arguments: tuple[str, str], changes: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        configure(*arguments, **changes)
