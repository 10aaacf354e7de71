"""The IDX format of MNIST and Fashion-MNIST.

A file is two zero bytes, one byte for the type of the entries (8: unsigned bytes), one byte for the number D
of dimensions, D sizes as big-endian 32-bit integers, then the entries in row-major order.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Mapping

import numpy as np

from persample.errors import DataError
from persample.experiments.data.dataset import Bytes, RawImages, require_labels

TRAIN_IMAGES = "train-images-idx3-ubyte.gz"
TRAIN_LABELS = "train-labels-idx1-ubyte.gz"
TEST_IMAGES = "t10k-images-idx3-ubyte.gz"
TEST_LABELS = "t10k-labels-idx1-ubyte.gz"

_UNSIGNED_BYTES = 8
_SIDE = 28


def read_idx(content: bytes, dimensions: int, source: str) -> Bytes:
    """Read an IDX file of unsigned bytes.

    Args:
        content: The file's bytes, gzip-compressed or unpacked.
        dimensions: How many dimensions the file has to have.
        source: The file's name, for errors.

    Returns:
        The array with the shape that the file states.

    Raises:
        DataError: The file is not gzip, not IDX, or of another length than its header states.
    """
    try:
        raw = content if content[:2] == b"\0\0" else gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(source, f"it cannot be decompressed: {error}") from error
    magic = bytes([0, 0, _UNSIGNED_BYTES, dimensions])
    if raw[:4] != magic:
        raise _damaged(source, f"it starts with {raw[:4].hex(' ')} where IDX has {magic.hex(' ')}")
    header = 4 + 4 * dimensions
    if len(raw) < header:
        raise _damaged(source, f"its header has {len(raw)} bytes instead of {header}")
    shape = tuple(int(size) for size in np.frombuffer(raw, ">u4", count=dimensions, offset=4))
    if len(raw) != header + math.prod(shape):
        raise _damaged(source, f"it has {len(raw)} bytes where its header {shape} asks for {header + math.prod(shape)}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def read_idx_dataset(files: Mapping[str, bytes], num_classes: int) -> RawImages:
    """Read the four files of MNIST or Fashion-MNIST.

    Args:
        files: The files' contents by their published names.
        num_classes: How many classes there are.

    Returns:
        The images as (N, 1, 28, 28) and their labels.

    Raises:
        DataError: A file is damaged, or images and labels do not belong together.
    """
    train_pixels, train_labels = _read_pair(files, TRAIN_IMAGES, TRAIN_LABELS, num_classes)
    test_pixels, test_labels = _read_pair(files, TEST_IMAGES, TEST_LABELS, num_classes)
    return RawImages(train_pixels, train_labels, test_pixels, test_labels)


def _read_pair(files: Mapping[str, bytes], images: str, labels: str, num_classes: int) -> tuple[Bytes, Bytes]:
    pixels = read_idx(files[images], 3, images)
    classes = read_idx(files[labels], 1, labels)
    if pixels.shape[1:] != (_SIDE, _SIDE):
        raise _damaged(images, f"its images are {pixels.shape[1:]} instead of {(_SIDE, _SIDE)}")
    if len(pixels) != len(classes):
        raise _damaged(labels, f"it has {len(classes)} labels for {len(pixels)} images in {images}")
    require_labels(classes, num_classes, labels)
    return pixels[:, None], classes


def _damaged(source: str, reason: str) -> DataError:
    return DataError(f"{source} is not a valid IDX file: {reason}; delete it and run again")
