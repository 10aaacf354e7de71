"""The binary format of CIFAR-10: records of a label byte and 3,072 pixel bytes (planes R, G, B of 32×32)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from persample.errors import DataError
from persample.experiments.data.dataset import Bytes, RawImages, require_labels

TRAIN_BATCHES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST_BATCH = "test_batch.bin"

_IMAGE = (3, 32, 32)
_RECORD = 1 + 3 * 32 * 32


def read_cifar_batch(content: bytes, num_classes: int, source: str) -> tuple[Bytes, Bytes]:
    """Read one batch file.

    Args:
        content: The file's bytes.
        num_classes: How many classes there are.
        source: The file's name, for errors.

    Returns:
        The images (N, 3, 32, 32) and the labels (N,).

    Raises:
        DataError: The length is not a whole number of records, or a label is out of range.
    """
    if not content or len(content) % _RECORD:
        raise DataError(
            f"{source} is not a CIFAR-10 batch: its {len(content)} bytes are not a whole number of "
            f"records of {_RECORD} bytes; delete it and run again"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
    labels = records[:, 0]
    require_labels(labels, num_classes, source)
    return records[:, 1:].reshape(-1, *_IMAGE), labels


def read_cifar_dataset(files: Mapping[str, bytes], num_classes: int) -> RawImages:
    """Read the five training batches and the test batch.

    Args:
        files: The files' contents by their published names.
        num_classes: How many classes there are.

    Returns:
        The images as (N, 3, 32, 32) and their labels.

    Raises:
        DataError: A file is damaged.
    """
    batches = [read_cifar_batch(files[name], num_classes, name) for name in TRAIN_BATCHES]
    pixels, labels = zip(*batches, strict=True)
    return RawImages(
        np.concatenate(pixels),
        np.concatenate(labels),
        *read_cifar_batch(files[TEST_BATCH], num_classes, TEST_BATCH),
    )
