from __future__ import annotations

import pytest
import torch

from persample.errors import OptionError
from persample.experiments.data import DATASET_NAMES, load_dataset
from persample.experiments.models import INPUT_SHAPES, MODELS, build_model, model_for


@pytest.mark.parametrize(("name", "parameters"), [("mnist-convnet", 21_840), ("lenet5", 62_006)])
def test_has_the_size_of_the_published_model(name: str, parameters: int) -> None:
    model = build_model(name)

    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model(torch.zeros(2, *INPUT_SHAPES[name])).shape == (2, 10)


def test_every_model_has_an_input_shape() -> None:
    assert MODELS.keys() == INPUT_SHAPES.keys()


@pytest.mark.parametrize("name", DATASET_NAMES)
def test_every_data_set_has_a_model(name: str) -> None:
    channels = 3 if name == "cifar10" else 1
    size = 32 if name == "cifar10" else 28

    assert model_for(name)(torch.zeros(1, channels, size, size)).shape == (1, 10)


def test_takes_the_images_of_a_loaded_data_set() -> None:
    assert model_for("mnist-5k")(load_dataset("mnist-5k").test_inputs[:2]).shape == (2, 10)


def test_refuses_unknown_names() -> None:
    with pytest.raises(OptionError, match="'resnet'; choose one of mnist-convnet, lenet5"):
        build_model("resnet")
    with pytest.raises(OptionError, match="'svhn'; choose one of mnist-5k, mnist, fashion-mnist, cifar10"):
        model_for("svhn")
