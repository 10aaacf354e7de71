"""Holding out training samples, to choose settings without the test data."""

from __future__ import annotations

from dataclasses import replace

import torch

from persample.errors import OptionError
from persample.experiments.data.dataset import ImageDataset


def hold_out(dataset: ImageDataset, count: int, generator: torch.Generator) -> ImageDataset:
    """Return the data set with random training samples in place of its test part.

    Args:
        dataset: The data.
        count: How many training samples to hold out; 0 leaves the data set as it is.
        generator: Draws them.

    Raises:
        OptionError: Nothing would be left to train on.
    """
    if count == 0:
        return dataset
    size = len(dataset.train_targets)
    if count >= size:
        raise OptionError(f"validation={count} leaves none of the {size} training samples to train on; hold out fewer")
    held_out, left = torch.randperm(size, generator=generator).split([count, size - count])
    return replace(
        dataset,
        train_inputs=dataset.train_inputs[left],
        train_targets=dataset.train_targets[left],
        test_inputs=dataset.train_inputs[held_out],
        test_targets=dataset.train_targets[held_out],
        held_out="validation",
    )
