"""What the tests of the experiment share.

A web server on this machine, and tiny data sets in the published formats, written
here by hand, independently of the readers.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from persample.experiments.data import ImageDataset, load_dataset
from persample.experiments.data.published import CIFAR10, MNIST, PublishedDataset, PublishedFile

UNREACHABLE = "http://127.0.0.1:9/"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Compute small tensors by one thread, which is faster and does not depend on how busy the machine is."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Let nothing but this empty folder be the cache, and no environment variable name another one."""
    folder = tmp_path / "cache"
    monkeypatch.delenv("PERSAMPLE_DATA", raising=False)
    monkeypatch.setattr("persample.experiments.data.load.cache_root", lambda: folder)
    return folder


class Handler(SimpleHTTPRequestHandler):
    """Serve a folder; a file with the further suffix `.cut` is sent by half, and the connection closed."""

    def do_GET(self) -> None:
        cut = Path(self.translate_path(self.path) + ".cut")
        if not cut.exists():
            return super().do_GET()
        content = cut.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        return None

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Serve a new folder over HTTP on this machine; its address, ending in a slash, and its path."""
    folder = tmp_path / "served"
    folder.mkdir()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}/", folder
    httpd.shutdown()
    httpd.server_close()
    thread.join()


@pytest.fixture(scope="session")
def digits() -> ImageDataset:
    """Return 40 real digits for training and 20 for testing."""
    everything = load_dataset("mnist-5k")
    return ImageDataset(
        "mnist-5k",
        everything.train_inputs[::100].clone(),
        everything.train_targets[::100].clone(),
        everything.test_inputs[::50].clone(),
        everything.test_targets[::50].clone(),
        num_classes=10,
    )


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
