"""Tiny data sets in the published formats, written here by hand, independently of the readers."""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import tarfile
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from persample.experiments.data.published import CIFAR10, MNIST, PublishedDataset, PublishedFile

UNREACHABLE = "http://127.0.0.1:9/"


def _idx(array: np.ndarray) -> bytes:
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes(), mtime=0)


def _tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _published(name: str, content: bytes) -> PublishedFile:
    return PublishedFile(name, len(content), f"md5:{hashlib.md5(content).hexdigest()}")


@pytest.fixture
def idx() -> Callable[[np.ndarray], bytes]:
    """Write an array as a compressed IDX file."""
    return _idx


@pytest.fixture
def mnist_files() -> dict[str, bytes]:
    random = np.random.default_rng(0)
    return {
        "train-images-idx3-ubyte.gz": _idx(random.integers(0, 256, (7, 28, 28))),
        "train-labels-idx1-ubyte.gz": _idx(random.integers(0, 10, 7)),
        "t10k-images-idx3-ubyte.gz": _idx(random.integers(0, 256, (3, 28, 28))),
        "t10k-labels-idx1-ubyte.gz": _idx(random.integers(0, 10, 3)),
    }


@pytest.fixture
def cifar_files() -> dict[str, bytes]:
    random = np.random.default_rng(0)

    def record() -> bytes:
        return bytes([random.integers(10)]) + random.integers(0, 256, 3072).astype(np.uint8).tobytes()

    names = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
    return {name: record() + record() for name in names}


@pytest.fixture
def cifar_archive(cifar_files: dict[str, bytes]) -> bytes:
    folder = "cifar-10-batches-bin"
    return _tar(
        {f"{folder}/readme.html": b"", "../outside": b"x", "/tmp/outside": b"x"}
        | {f"{folder}/{name}": content for name, content in cifar_files.items()}
    )


@pytest.fixture
def tiny_mnist(mnist_files: dict[str, bytes]) -> PublishedDataset:
    """Describe `mnist_files` in the way of the real MNIST, at an address where nobody answers."""
    files = tuple(_published(name, content) for name, content in mnist_files.items())
    return replace(MNIST, title="Tiny MNIST", files=files, url=UNREACHABLE)


@pytest.fixture
def tiny_cifar(cifar_files: dict[str, bytes], cifar_archive: bytes) -> PublishedDataset:
    """Describe `cifar_files` in the way of the real CIFAR-10, at an address where nobody answers."""
    files = tuple(_published(name, content) for name, content in cifar_files.items())
    archive = _published("cifar-10-binary.tar.gz", cifar_archive)
    return replace(CIFAR10, title="Tiny CIFAR", files=files, archive=archive, url=UNREACHABLE)
