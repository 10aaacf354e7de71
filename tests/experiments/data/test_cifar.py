from __future__ import annotations

import numpy as np
import pytest

from persample.errors import DataError
from persample.experiments.data.cifar import read_cifar_batch, read_cifar_dataset


def test_reads_planes_of_red_green_blue() -> None:
    first = bytes([7]) + bytes([1]) * 1024 + bytes([2]) * 1024 + bytes([3]) * 1024
    second = bytearray(3073)
    second[1 + 1024 + 32 * 5 + 9] = 200  # green, row 5, column 9

    pixels, labels = read_cifar_batch(first + bytes(second), 10, "file")

    assert labels.tolist() == [7, 0]
    assert pixels.shape == (2, 3, 32, 32)
    assert pixels[0].mean(axis=(1, 2)).tolist() == [1, 2, 3]
    assert np.argwhere(pixels[1]).tolist() == [[1, 5, 9]]


def test_joins_the_batches_in_order(cifar_files: dict[str, bytes]) -> None:
    raw = read_cifar_dataset(cifar_files, 10)

    records = b"".join(cifar_files[f"data_batch_{number}.bin"] for number in range(1, 6))
    assert raw.train_labels.tolist() == [records[start] for start in range(0, len(records), 3073)]
    assert raw.train_pixels[9].tobytes() == records[-3072:]
    assert raw.test_pixels.shape == (2, 3, 32, 32)


@pytest.mark.parametrize("content", [b"", bytes(3072), bytes(3074), bytes(2 * 3073 - 1)])
def test_refuses_broken_records(content: bytes) -> None:
    with pytest.raises(DataError, match=rf"^some\.bin .* its {len(content)} bytes are not a whole number"):
        read_cifar_batch(content, 10, "some.bin")


def test_refuses_labels_out_of_range() -> None:
    with pytest.raises(DataError, match=r"^some\.bin holds the label 10, but the classes go from 0 to 9"):
        read_cifar_batch(bytes([10]) + bytes(3072), 10, "some.bin")
