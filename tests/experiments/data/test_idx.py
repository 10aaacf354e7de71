from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persample.errors import DataError
from persample.experiments.data.idx import read_idx, read_idx_dataset


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_reads_what_was_written(shape: list[int], seed: int) -> None:
    array = np.random.default_rng(seed).integers(0, 256, shape)
    raw = struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape) + array.astype(np.uint8).tobytes()

    np.testing.assert_array_equal(read_idx(packed(raw), len(shape), "file"), array)
    np.testing.assert_array_equal(read_idx(raw, len(shape), "file"), array)


# Without a time, which would be another for each process that collects these cases.
packed = partial(gzip.compress, mtime=0)

GOOD = struct.pack(">BBBBII", 0, 0, 8, 2, 2, 3) + bytes(range(6))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"not gzip at all", "cannot be decompressed", id="not gzip at all"),
        pytest.param(b"", "starts with", id="empty"),
        pytest.param(packed(GOOD)[:-9], "cannot be decompressed", id="gzip cut off"),
        pytest.param(
            packed(GOOD)[:15] + b"\xff\xff\xff" + packed(GOOD)[18:], "cannot be decompressed", id="gzip damaged"
        ),
        pytest.param(
            packed(b"\0\0\x0d\x02" + GOOD[4:]),
            "starts with 00 00 0d 02 where IDX has 00 00 08 02",
            id="floats in gzip",
        ),
        pytest.param(packed(b"\0\0\x08\x03" + GOOD[4:]), "starts with 00 00 08 03", id="three axes"),
        pytest.param(packed(GOOD[:3]), "starts with", id="three bytes"),
        pytest.param(packed(GOOD[:9]), "header has 9 bytes instead of 12", id="header cut off in gzip"),
        pytest.param(packed(GOOD[:-1]), r"17 bytes where its header \(2, 3\) asks for 18", id="a byte short"),
        pytest.param(packed(GOOD + b"\0"), "19 bytes", id="a byte more in gzip"),
        pytest.param(GOOD + b"\0", "19 bytes", id="a byte more"),
        pytest.param(GOOD[:9], "header has 9 bytes instead of 12", id="header cut off"),
        pytest.param(b"\0\0\x0d\x02" + GOOD[4:], "starts with 00 00 0d 02 where IDX has 00 00 08 02", id="floats"),
        pytest.param(
            packed(struct.pack(">BBBBII", 0, 0, 8, 2, 2**32 - 1, 2**32 - 1)), "12 bytes", id="a header that boasts"
        ),
    ],
)
def test_refuses_damaged_files(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"^some\.gz is not a valid IDX file: .*{message}.*delete it"):
        read_idx(content, 2, "some.gz")


def test_reads_the_four_files(mnist_files: dict[str, bytes]) -> None:
    raw = read_idx_dataset(mnist_files, 10)

    pixels = gzip.decompress(mnist_files["train-images-idx3-ubyte.gz"])[16:]
    assert raw.train_pixels.shape == (7, 1, 28, 28)
    assert raw.train_pixels.tobytes() == pixels
    assert raw.train_labels.tobytes() == gzip.decompress(mnist_files["train-labels-idx1-ubyte.gz"])[8:]
    assert raw.test_pixels.shape == (3, 1, 28, 28)
    assert raw.test_labels.shape == (3,)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("train-images-idx3-ubyte.gz", np.zeros((7, 28, 27)), r"\(28, 27\) instead of \(28, 28\)"),
        ("train-labels-idx1-ubyte.gz", np.zeros(8), "8 labels for 7 images in train-images"),
        ("t10k-labels-idx1-ubyte.gz", np.array([0, 10, 9]), "label 10, but the classes go from 0 to 9"),
    ],
)
def test_refuses_files_that_do_not_belong_together(
    mnist_files: dict[str, bytes], idx: Callable[[np.ndarray], bytes], name: str, array: np.ndarray, message: str
) -> None:
    with pytest.raises(DataError, match=rf"^{name} .*{message}"):
        read_idx_dataset(mnist_files | {name: idx(array)}, 10)
