"""Finding the files of a published data set on disk, and reading them only if they are the published ones."""

from __future__ import annotations

import hashlib
from pathlib import Path

from persample.errors import DataError
from persample.experiments.data.published import PUBLISHED, PublishedFile, PublishedFiles


def find(dataset: PublishedFiles, root: Path) -> Path | None:
    """Return the folder below `root`, or `root` itself, in which at least one of the data set's files lies.

    Args:
        dataset: What to look for.
        root: A folder of data sets, or the folder of this one.

    Returns:
        The folder, or None.
    """
    parts = Path(dataset.folder).parts
    candidates = [root.joinpath(*parts[start:]) for start in range(len(parts) + 1)]
    return next((folder for folder in candidates if missing_files(dataset, folder) != dataset.files), None)


def missing_files(dataset: PublishedFiles, folder: Path) -> tuple[PublishedFile, ...]:
    """Return the data set's files that `folder` lacks, both as published and unpacked."""
    return tuple(file for file in dataset.files if not _path_of(file, folder).exists())


def _path_of(file: PublishedFile, folder: Path) -> Path:
    """Return where `file` lies in `folder`, perhaps unpacked; where it should lie if it does not."""
    published, *unpacked = (folder / name for name in file.names())
    if published.exists():
        return published
    # Some archives unpack each file into a folder of its name.
    return next((path for path in unpacked if path.is_file()), published)


def read_verified(dataset: PublishedFiles, folder: Path) -> dict[str, bytes]:
    """Read all files of the data set, each checked against its published size and checksum.

    Args:
        dataset: The data set.
        folder: The folder in which its files lie.

    Returns:
        The contents by file name.

    Raises:
        DataError: A file is missing, unreadable, or not the published one.
    """
    return {file.name: _read_verified_file(dataset, file, _path_of(file, folder)) for file in dataset.files}


def _read_verified_file(dataset: PublishedFiles, file: PublishedFile, path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        names = ", ".join(missing.name for missing in missing_files(dataset, path.parent))
        raise DataError(
            f"{dataset.title} in {path.parent} is incomplete, it lacks {names}; put the missing files there, "
            "or point --data-dir (argument data_dir) at a complete folder"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; make it a readable file") from error
    published = file.checksum if file.unpacked is None or path.name == file.name else file.unpacked
    algorithm, expected = published.split(":")
    found = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise DataError(
            f"{path} is not the published file of {dataset.title}: it has {len(content):,} bytes and the "
            f"{algorithm} {found}, {_published(file, path)} {expected}"
            f"{_whose(f'{algorithm}:{found}')}; delete it and run again, or point --data-dir "
            "(argument data_dir) at another folder"
        )
    return content


def _published(file: PublishedFile, path: Path) -> str:
    return f"published are {file.size:,} bytes and" if path.name == file.name else "unpacked it has"


def _whose(checksum: str) -> str:
    owners = [d.title for d in PUBLISHED.values() for file in d.files if checksum in (file.checksum, file.unpacked)]
    return f" (it is the file of {owners[0]})" if owners else ""
