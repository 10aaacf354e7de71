from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from persample.errors import DataError
from persample.experiments.data.download import download
from persample.experiments.data.folders import read_verified
from persample.experiments.data.published import PublishedDataset


def serve(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def everything_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_downloads_single_files(
    server: tuple[str, Path], tmp_path: Path, tiny_mnist: PublishedDataset, mnist_files: dict[str, bytes]
) -> None:
    url, served = server
    serve(served, mnist_files)

    folder = download(replace(tiny_mnist, url=url), tmp_path / "data")

    assert folder == tmp_path / "data" / "mnist"
    assert read_verified(tiny_mnist, folder) == mnist_files
    assert everything_below(folder) == sorted(mnist_files)


def test_shows_progress(
    server: tuple[str, Path],
    tmp_path: Path,
    tiny_mnist: PublishedDataset,
    mnist_files: dict[str, bytes],
    capfd: pytest.CaptureFixture[str],
) -> None:
    url, served = server
    serve(served, mnist_files)

    download(replace(tiny_mnist, url=url), tmp_path)

    assert "100%" in capfd.readouterr().err


def test_downloads_only_what_is_missing(
    server: tuple[str, Path], tmp_path: Path, tiny_mnist: PublishedDataset, mnist_files: dict[str, bytes]
) -> None:
    url, served = server
    serve(served, {name: mnist_files[name] for name in sorted(mnist_files)[:1]})
    (tmp_path / "mnist").mkdir()
    serve(tmp_path / "mnist", {name: mnist_files[name] for name in sorted(mnist_files)[1:]})

    folder = download(replace(tiny_mnist, url=url), tmp_path)

    assert read_verified(tiny_mnist, folder) == mnist_files


def test_unpacks_only_the_files_of_the_archive(
    server: tuple[str, Path],
    tmp_path: Path,
    tiny_cifar: PublishedDataset,
    cifar_files: dict[str, bytes],
    cifar_archive: bytes,
) -> None:
    url, served = server
    serve(served, {"cifar-10-binary.tar.gz": cifar_archive})

    folder = download(replace(tiny_cifar, url=url), tmp_path / "data")

    assert read_verified(tiny_cifar, folder) == cifar_files
    assert everything_below(tmp_path / "data") == sorted(f"cifar10/cifar-10-batches-bin/{name}" for name in cifar_files)


def test_refuses_what_is_not_the_published_file(
    server: tuple[str, Path], tmp_path: Path, tiny_mnist: PublishedDataset, mnist_files: dict[str, bytes]
) -> None:
    url, served = server
    serve(served, mnist_files | {"train-labels-idx1-ubyte.gz": b"<html>Please log in</html>"})

    with pytest.raises(DataError, match=rf"{url}train-labels.* did not return the published file .* Run again later"):
        download(replace(tiny_mnist, url=url), tmp_path)

    assert everything_below(tmp_path / "mnist") == ["train-images-idx3-ubyte.gz"]


def test_refuses_a_download_that_breaks_off(
    server: tuple[str, Path], tmp_path: Path, tiny_mnist: PublishedDataset, mnist_files: dict[str, bytes]
) -> None:
    url, served = server
    serve(served, {f"{name}.cut": content for name, content in mnist_files.items()})

    with pytest.raises(DataError, match=rf"{url}train-images.* cannot be downloaded"):
        download(replace(tiny_mnist, url=url), tmp_path)

    assert everything_below(tmp_path / "mnist") == []


def test_says_that_a_file_is_not_served(server: tuple[str, Path], tmp_path: Path, tiny_cifar: PublishedDataset) -> None:
    url, _ = server

    with pytest.raises(DataError, match=rf"{url}cifar-10-binary\.tar\.gz cannot be downloaded: 404"):
        download(replace(tiny_cifar, url=url), tmp_path)


def test_says_what_to_do_without_a_network(
    tmp_path: Path, tiny_mnist: PublishedDataset, tiny_cifar: PublishedDataset
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"

        with pytest.raises(DataError, match=rf"{url}train-images.*DIR/mnist.*--data-dir DIR.*mnist-5k"):
            download(replace(tiny_mnist, url=url), tmp_path)
        with pytest.raises(DataError, match=rf"get {url}cifar-10-binary\.tar\.gz and unpack it in DIR/cifar10"):
            download(replace(tiny_cifar, url=url), tmp_path)


def test_says_that_the_folder_cannot_be_made(tmp_path: Path, tiny_mnist: PublishedDataset) -> None:
    (tmp_path / "mnist").write_text("a file in the way")

    with pytest.raises(DataError, match=r"Tiny MNIST cannot be stored in .*mnist: File exists"):
        download(tiny_mnist, tmp_path)
