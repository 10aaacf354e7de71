from __future__ import annotations

import os
from pathlib import Path

import pytest

from persample.files import replacing


def test_takes_the_place_of_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text("old")

    with replacing(path) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".txt"
        temporary.write_text("new")
        assert path.read_text() == "old"

    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text("old")

    def fail_in_the_middle() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_in_the_middle()

    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_gives_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")

    with replacing(tmp_path / "some.txt"):
        pass

    assert (tmp_path / "some.txt").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_file_that_is_replaced_passes_its_permissions_on(tmp_path: Path) -> None:
    path = tmp_path / "private.txt"
    path.write_text("old")
    path.chmod(0o600)

    with replacing(path) as temporary:
        temporary.write_text("new")

    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.name != "posix", reason="links of POSIX")
@pytest.mark.parametrize("there", [True, False], ids=["to a file", "to nothing yet"])
def test_of_a_link_the_target_is_replaced(tmp_path: Path, there: bool) -> None:
    (tmp_path / "far").mkdir()
    target, between, link = tmp_path / "far" / "target.txt", tmp_path / "between.txt", tmp_path / "link.txt"
    if there:
        target.write_text("old")
    between.symlink_to(target)
    link.symlink_to(between)

    with replacing(link) as temporary:
        assert temporary.parent == target.parent
        temporary.write_text("new")

    assert target.read_text() == "new"
    assert link.is_symlink()
    assert between.is_symlink()
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "far", between, link])


def _as_written(path: Path) -> tuple[int, ...]:
    """What changes when a file is written or replaced, but not when it is looked at."""
    found = path.lstat()
    return found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@pytest.mark.skipif(os.name != "posix", reason="files of POSIX")
@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "folder", "circle of links"])
def test_what_is_no_file_is_refused_and_stays(tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / "path", tmp_path / "other"
    if kind == "folder":
        path.mkdir()
    elif kind == "circle of links":
        path.symlink_to(other)
        other.symlink_to(path)
    else:
        os.mkfifo(path if kind == "pipe" else other)
        if kind == "link to a pipe":
            path.symlink_to(other)
    before = {found: _as_written(found) for found in tmp_path.iterdir()}

    with pytest.raises(OSError), replacing(path):  # noqa: PT011 - its number depends on the kind
        pytest.fail("the block is not entered")

    assert {found: _as_written(found) for found in tmp_path.iterdir()} == before
