from __future__ import annotations

import numpy as np
import torch

from persample.experiments.data.dataset import RawImages, standardise


def test_standardises_each_channel_with_the_training_images() -> None:
    random = np.random.default_rng(0)
    train = random.integers(0, 256, (50, 3, 4, 5)).astype(np.uint8)
    train[:, 1] //= 3
    test = random.integers(0, 256, (20, 3, 4, 5)).astype(np.uint8)
    labels = np.arange(50, dtype=np.uint8)

    dataset = standardise("name", RawImages(train, labels, test, labels[:20]), num_classes=50)

    mean = (train / 255).mean(axis=(0, 2, 3), keepdims=True)
    deviation = (train / 255).std(axis=(0, 2, 3), keepdims=True)
    np.testing.assert_allclose(dataset.train_inputs, (train / 255 - mean) / deviation, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(dataset.test_inputs, (test / 255 - mean) / deviation, rtol=1e-6, atol=1e-7)
    assert dataset.train_inputs.dtype == torch.float32
    assert dataset.train_targets.dtype == torch.int64
    assert dataset.train_targets.tolist() == labels.tolist()
    assert dataset.test_targets.tolist() == list(range(20))
    assert (dataset.name, dataset.num_classes) == ("name", 50)
