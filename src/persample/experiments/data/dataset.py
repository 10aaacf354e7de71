"""A loaded data set, and the standardisation of its pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from persample.errors import DataError

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class ImageDataset:
    """Images with their classes, split as published into a training and a test part.

    Attributes:
        name: The name by which it was loaded.
        train_inputs: (N, C, H, W) float32, standardised by `standardise`.
        train_targets: (N,) int64, classes from 0 to `num_classes` - 1.
        test_inputs: (M, C, H, W) float32, standardised with the numbers of the training part.
        test_targets: (M,) int64.
        num_classes: How many classes there are.
        held_out: What the test part is: the published one, or samples held out of the training part to choose
            settings by (`hold_out`).
    """

    name: str
    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    num_classes: int
    held_out: Literal["validation", "test"] = "test"


@dataclass(frozen=True)
class RawImages:
    """A data set as stored in its files.

    Attributes:
        train_pixels: (N, C, H, W) bytes.
        train_labels: (N,) bytes.
        test_pixels: (M, C, H, W) bytes.
        test_labels: (M,) bytes.
    """

    train_pixels: Bytes
    train_labels: Bytes
    test_pixels: Bytes
    test_labels: Bytes


def require_labels(labels: Bytes, num_classes: int, source: str) -> None:
    """Refuse labels outside 0 to `num_classes` - 1.

    Raises:
        DataError: Naming `source` and the largest label.
    """
    if labels.size and labels.max() >= num_classes:
        raise DataError(
            f"{source} holds the label {labels.max()}, but the classes go from 0 to {num_classes - 1}; "
            "this is not the published file: delete it and run again"
        )


def standardise(name: str, raw: RawImages, num_classes: int) -> ImageDataset:
    """Scale the pixels to [0, 1], then give each channel mean 0 and standard deviation 1.

    Mean and standard deviation are those of the training images, over all their pixels, per channel; the test
    images are transformed with the same two numbers.

    Args:
        name: The name of the data set.
        raw: Its images and labels as bytes.
        num_classes: How many classes there are.

    Returns:
        The data set as tensors.
    """
    table = _standardised_values(raw.train_pixels)
    return ImageDataset(
        name=name,
        train_inputs=_look_up(table, raw.train_pixels),
        train_targets=torch.from_numpy(raw.train_labels.astype(np.int64)),
        test_inputs=_look_up(table, raw.test_pixels),
        test_targets=torch.from_numpy(raw.test_labels.astype(np.int64)),
        num_classes=num_classes,
    )


def _standardised_values(pixels: Bytes) -> NDArray[np.float32]:
    """Return (C, 256): the standardised value of each byte value in each channel.

    A histogram gives mean and variance in float64 without a float64 copy of the images.
    """
    values = np.arange(256) / 255.0
    rows = []
    for channel in range(pixels.shape[1]):
        shares = np.bincount(pixels[:, channel].ravel(), minlength=256) / pixels[:, channel].size
        mean = shares @ values
        deviation = np.sqrt(shares @ (values - mean) ** 2)
        rows.append((values - mean) / deviation)
    return np.stack(rows).astype(np.float32)


def _look_up(table: NDArray[np.float32], pixels: Bytes) -> Tensor:
    images = torch.empty(pixels.shape, dtype=torch.float32)
    for channel, values in enumerate(table):
        images[:, channel] = torch.from_numpy(values[pixels[:, channel]])
    return images
