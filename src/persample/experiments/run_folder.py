"""The output folder of a command: created, locked by one command at a time, cleaned of leftovers."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from persample.errors import DataError
from persample.files import replacing

_LOCK = ".lock"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Create the folder, and lock it against other commands.

    The operating system lets go of the lock when the process ends, however it ends: a killed run leaves an empty file
    `.lock` at most, which the next one takes over. A file system without locks is used without.

    Raises:
        DataError: The folder cannot be made or written to, or another command writes to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be made: {error.strerror}; choose another --out") from error
    path = folder / _LOCK
    try:
        handle = _locked(path)
    except BlockingIOError as error:
        raise DataError(
            f"another command is writing to {folder}: wait for its end, or choose another folder (--out)"
        ) from error
    except OSError as error:
        raise _not_written(path, error) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file
            path.unlink(missing_ok=True)
        os.close(handle)


def _locked(path: Path) -> int:
    """Open and lock the file; retry if it is no longer at its path, because its last holder removes it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(handle)
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> None:
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError from error

else:
    import fcntl

    def _lock(handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass  # this file system has no locks


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` if the block succeeds, see `replacing`.

    Raises:
        DataError: The disk is full or read-only, or something else is at `path`.
    """
    try:
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise _not_written(path, error) from error


def _not_written(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path} cannot be written: {error.strerror or error}; make room there, or choose another folder (--out)"
    )


def remove(paths: Iterable[Path]) -> None:
    """Remove files of an earlier run.

    Raises:
        DataError: One of them cannot be removed.
    """
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"{path} cannot be removed: {error.strerror}; choose another folder (--out)") from error


def remove_begun(paths: Iterable[Path]) -> None:
    """Remove temporary files that killed runs left beside these paths.

    Raises:
        DataError: One of them cannot be removed.
    """
    for path in map(Path, map(os.path.realpath, paths)):
        begun = re.compile(rf"\.{re.escape(path.stem)}-[a-z0-9_]{{8}}{re.escape(path.suffix)}")
        for sibling in path.parent.iterdir():
            if begun.fullmatch(sibling.name):
                if sibling.is_dir():
                    shutil.rmtree(sibling)
                else:
                    remove([sibling])
