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
