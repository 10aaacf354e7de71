"""The two models of the paper's Table 1, as plain `nn.Sequential`."""

from __future__ import annotations

from torch import nn

from persample.errors import OptionError


def mnist_convnet() -> nn.Sequential:
    """Build the first model of Table 1: a convolutional network for 28×28 grey images in 10 classes.

    The published table prints three input channels, where MNIST has one; this is the model with one.

    Returns:
        A model from (B, 1, 28, 28) to logits (B, 10), with 5,142 parameters.
    """
    return nn.Sequential(
        nn.Conv2d(1, 6, kernel_size=5),  # (B, 6, 24, 24)
        nn.ReLU(),
        nn.MaxPool2d(2),  # (B, 6, 12, 12)
        nn.Conv2d(6, 16, kernel_size=5),  # (B, 16, 8, 8)
        nn.ReLU(),
        nn.MaxPool2d(2),  # (B, 16, 4, 4)
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def lenet5() -> nn.Sequential:
    """Build the second model of Table 1: LeNet-5 for 32×32 colour images in 10 classes.

    Returns:
        A model from (B, 3, 32, 32) to logits (B, 10), with 62,006 parameters.
    """
    return nn.Sequential(
        nn.Conv2d(3, 6, kernel_size=5),  # (B, 6, 28, 28)
        nn.ReLU(),
        nn.MaxPool2d(2),  # (B, 6, 14, 14)
        nn.Conv2d(6, 16, kernel_size=5),  # (B, 16, 10, 10)
        nn.ReLU(),
        nn.MaxPool2d(2),  # (B, 16, 5, 5)
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


MODELS = {"mnist-convnet": mnist_convnet, "lenet5": lenet5}
MODEL_TITLES = {"mnist-convnet": "ConvNet", "lenet5": "LeNet-5"}
INPUT_SHAPES = {"mnist-convnet": (1, 28, 28), "lenet5": (3, 32, 32)}

#: The model that the paper trains on each data set; Fashion-MNIST has MNIST's format and takes its model.
MODEL_OF_DATASET = {
    "mnist-5k": "mnist-convnet",
    "mnist": "mnist-convnet",
    "fashion-mnist": "mnist-convnet",
    "cifar10": "lenet5",
}


def build_model(name: str) -> nn.Sequential:
    """Build the model called `name`, with weights from torch's global random generator.

    Raises:
        OptionError: No model has this name.
    """
    if name not in MODELS:
        raise OptionError(f"no model is called {name!r}; choose one of {', '.join(MODELS)}")
    return MODELS[name]()


def model_for(dataset_name: str) -> nn.Sequential:
    """Build the paper's model for a data set, with weights from torch's global random generator.

    Raises:
        OptionError: The data set is not one of the experiment's.
    """
    if dataset_name not in MODEL_OF_DATASET:
        names = ", ".join(MODEL_OF_DATASET)
        raise OptionError(f"the paper has no model for the data set {dataset_name!r}; choose one of {names}")
    return build_model(MODEL_OF_DATASET[dataset_name])
