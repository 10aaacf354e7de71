"""The data of the contest: classified images, and out-of-distribution images in the same format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from persample.experiments.data import ImageDataset, load_dataset

OUTSIDE = "fashion-mnist"


def load(name: str, data_dir: Path | None, samples: int | None = None) -> tuple[ImageDataset, Tensor]:
    """Return a data set, and the test images of Fashion-MNIST as a network for that data set sees them.

    Args:
        name: The data set.
        data_dir: See `load_dataset`.
        samples: How many samples to keep of each part; None is all.

    Raises:
        DataError: See `load_dataset`.
    """
    data = load_dataset(name, data_dir)
    outside = in_format_of(data.train_inputs, load_dataset(OUTSIDE, data_dir).test_inputs)
    if samples is None:
        return data, outside
    return replace(
        data,
        train_inputs=data.train_inputs[:samples].clone(),
        train_targets=data.train_targets[:samples].clone(),
        test_inputs=data.test_inputs[:samples].clone(),
        test_targets=data.test_targets[:samples].clone(),
    ), outside[:samples].clone()


def in_format_of(images: Tensor, others: Tensor) -> Tensor:
    """Return grey images in the format of `images`: with a black border to their size, in all their channels.

    Black and white become what they are in each channel of `images`, whose darkest and brightest pixels are those.

    Args:
        images: (N, C, H, W).
        others: (M, 1, h, w), h ≤ H and w ≤ W, with black and white pixels.

    Returns:
        (M, C, H, W).
    """
    height, width = images.shape[2] - others.shape[2], images.shape[3] - others.shape[3]
    border = (width // 2, width - width // 2, height // 2, height - height // 2)
    black = others.min()
    grey = F.pad((others - black) / (others.max() - black), border)
    low, high = images.amin((0, 2, 3))[:, None, None], images.amax((0, 2, 3))[:, None, None]
    return low + grey * (high - low)
