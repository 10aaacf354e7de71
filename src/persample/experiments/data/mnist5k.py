"""5,000 digits of MNIST (500 of each) in one small file: compressed text, one image and its class a line."""

from __future__ import annotations

import gzip
import io
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from persample.errors import DataError
from persample.experiments.data.dataset import Bytes, RawImages

FILE = "mnist_5k.csv.gz"

_PER_CLASS = 500
_TEST_PER_CLASS = 100
_SEED = 2019


def read_mnist_5k(files: Mapping[str, bytes], num_classes: int) -> RawImages:
    """Read the images and split them, the same way every time, into 4,000 for training and 1,000 for testing.

    The split is stratified: 400 and 100 images of each digit.

    Args:
        files: The file's contents by its published name.
        num_classes: How many classes there are.

    Returns:
        The images as (4000, 1, 28, 28) and (1000, 1, 28, 28) with their labels.

    Raises:
        DataError: The file is damaged.
    """
    try:
        text = io.BytesIO(gzip.decompress(files[FILE]))
        table = np.loadtxt(text, dtype=np.uint8, delimiter=",", ndmin=2)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{FILE} cannot be read: {error}; delete it and run again") from error
    images, classes = table[:, :-1], table[:, -1]
    counts = np.bincount(classes, minlength=num_classes).tolist()
    if counts != [_PER_CLASS] * num_classes or images.shape[1] != 28 * 28:
        raise DataError(f"{FILE} does not hold {_PER_CLASS} images of each digit: {counts}; delete it and run again")
    images = images.reshape(-1, 1, 28, 28)
    test = _test_rows(classes, num_classes)
    return RawImages(images[~test], classes[~test], images[test], classes[test])


def _test_rows(classes: Bytes, num_classes: int) -> NDArray[np.bool_]:
    # RandomState, unlike Generator, promises the same numbers in every version of NumPy.
    random = np.random.RandomState(_SEED)
    chosen = np.zeros(len(classes), dtype=np.bool_)
    for digit in range(num_classes):
        chosen[random.permutation(np.flatnonzero(classes == digit))[:_TEST_PER_CLASS]] = True
    return chosen
