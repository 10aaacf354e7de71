"""Writing files whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from persample.errors import OptionError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` if the block succeeds.

    The temporary name keeps the suffix, so that writers that choose a format by it do so. When the block
    raises, the temporary file is removed, and what was at `path` before stays. A file that is replaced passes its
    permissions on; of a symbolic link the target is replaced, and the link stays.

    Args:
        path: The file to write; its folder exists.

    Yields:
        The path to write to, in the same folder.

    Raises:
        OSError: `path` is a folder, a pipe or a device, or cannot be written.
    """
    path = Path(os.path.realpath(path))
    permissions = _permissions(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(permissions)  # mkstemp makes files that only their owner may read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _permissions(path: Path) -> int:
    """The permissions of the file at `path`, or the default ones of a new file.

    Raises:
        OSError: what is there is no regular file, and to replace it would be to destroy it.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return 0o666 & ~_umask()
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a pipe, a socket or a device, not a regular file", str(path))
    return stat.S_IMODE(mode)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def at_home(path: Path) -> Path:
    """Return `path` with a leading `~` or `~user` replaced by the home folder.

    Raises:
        OptionError: There is no such user.
    """
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise OptionError(f"{path} begins with a home folder that does not exist: write the path in full") from error
