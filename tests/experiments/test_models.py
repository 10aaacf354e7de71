from __future__ import annotations

import pytest
import torch

from persample.errors import OptionError
from persample.experiments.data import DATASET_NAMES, load_dataset
from persample.experiments.models import INPUT_SHAPES, MODELS, build_model, model_for

#: Table 1 of Jain and Khan: the layers with the shape of one sample behind each, and how many parameters all have.
#: The table prints three input channels for MNIST, which has one; the softmax is part of the loss.
TABLE_1 = {
    "mnist-convnet": [
        ("Conv2d", {"in_channels": 1, "out_channels": 6, "kernel_size": (5, 5)}, (6, 24, 24)),
        ("ReLU", {}, (6, 24, 24)),
        ("MaxPool2d", {"kernel_size": 2, "stride": 2}, (6, 12, 12)),
        ("Conv2d", {"in_channels": 6, "out_channels": 16, "kernel_size": (5, 5)}, (16, 8, 8)),
        ("ReLU", {}, (16, 8, 8)),
        ("MaxPool2d", {"kernel_size": 2, "stride": 2}, (16, 4, 4)),
        ("Flatten", {}, (256,)),
        ("Linear", {"in_features": 256, "out_features": 10}, (10,)),
    ],
    "lenet5": [
        ("Conv2d", {"in_channels": 3, "out_channels": 6, "kernel_size": (5, 5)}, (6, 28, 28)),
        ("ReLU", {}, (6, 28, 28)),
        ("MaxPool2d", {"kernel_size": 2, "stride": 2}, (6, 14, 14)),
        ("Conv2d", {"in_channels": 6, "out_channels": 16, "kernel_size": (5, 5)}, (16, 10, 10)),
        ("ReLU", {}, (16, 10, 10)),
        ("MaxPool2d", {"kernel_size": 2, "stride": 2}, (16, 5, 5)),
        ("Flatten", {}, (400,)),
        ("Linear", {"in_features": 400, "out_features": 120}, (120,)),
        ("ReLU", {}, (120,)),
        ("Linear", {"in_features": 120, "out_features": 84}, (84,)),
        ("ReLU", {}, (84,)),
        ("Linear", {"in_features": 84, "out_features": 10}, (10,)),
    ],
}
#: What all convolutions and poolings of the table have in common.
OF_KIND = {
    "Conv2d": {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1},
    "MaxPool2d": {"padding": 0, "dilation": 1},
}


@pytest.mark.parametrize("name", TABLE_1)
def test_is_the_model_of_table_1_layer_by_layer(name: str) -> None:
    x, found, expected = torch.zeros(2, *INPUT_SHAPES[name]), [], []
    for layer, (kind, settings, shape) in zip(build_model(name), TABLE_1[name], strict=True):
        x = layer(x)
        pinned = settings | OF_KIND.get(kind, {})
        found.append((type(layer).__name__, {key: getattr(layer, key) for key in pinned}, tuple(x.shape[1:])))
        expected.append((kind, pinned, shape))
        assert getattr(layer, "bias", True) is not None

    assert found == expected


@pytest.mark.parametrize(("name", "parameters"), [("mnist-convnet", 5_142), ("lenet5", 62_006)])
def test_has_as_many_parameters_as_the_published_model(name: str, parameters: int) -> None:
    assert sum(parameter.numel() for parameter in build_model(name).parameters()) == parameters


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
