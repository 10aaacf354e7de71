"""The folder of a run: one command at a time, nothing half written, nothing left of killed runs, failures in words."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from persample.errors import DataError
from persample.experiments.run_folder import held, remove, remove_begun, writing

HOLDER = """
import sys, time
from pathlib import Path
from persample.experiments.run_folder import held
with held(Path(sys.argv[1])):
    print("holds", flush=True)
    time.sleep(600)
"""


def test_is_made_and_held_by_one_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "some" / "folder"
    with held(folder):
        with pytest.raises(DataError, match=r"another command is writing to .*folder: wait .*--out"), held(folder):
            pass
        with held(tmp_path / "other"):
            pass
    assert list(folder.iterdir()) == []
    with held(folder):
        pass


def test_an_error_lets_it_go(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), held(tmp_path):
        raise ZeroDivisionError
    with held(tmp_path):
        pass


def test_a_link_to_it_is_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    with held(tmp_path / "folder"), pytest.raises(DataError, match="another command"), held(tmp_path / "link"):
        pass


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is of POSIX")
def test_is_free_again_when_its_holder_was_killed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holds\n"
        with pytest.raises(DataError, match="another command is writing"), held(tmp_path):
            pass
        os.kill(holder.pid, signal.SIGKILL)
    with held(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_stands_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"the folder .*file cannot be made: File exists"), held(tmp_path / "file"):
        pass
    (tmp_path / ".lock").mkdir()
    with pytest.raises(DataError, match=r"\.lock cannot be written: Is a directory"), held(tmp_path):
        pass


def test_files_are_written_whole_or_not_and_errors_are_told(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    with writing(path) as temporary:
        temporary.write_text("whole")

    def fail() -> None:
        with writing(path) as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary))

    with pytest.raises(DataError, match=r"table\.csv cannot be written: No space left on device; make room"):
        fail()
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(DataError, match="cannot be written"), writing(tmp_path):
        pass


def test_begun_files_are_removed_and_no_others(tmp_path: Path) -> None:
    begun = [".adam-k1ll3d00.pt", ".adam-________.pt", ".config-12345678.json"]
    others = ["adam.pt", ".adam-notes.pt", ".adam-k1ll3d00.txt", ".adam-K1LL3D00.pt", ".vogn-k1ll3d00.pt", "x.json"]
    for name in begun + others:
        (tmp_path / name).write_text("")
    (tmp_path / ".partial-abcdefgh").mkdir()
    (tmp_path / ".partial-abcdefgh" / "events").write_text("")
    remove_begun([tmp_path / "adam.pt", tmp_path / "config.json", tmp_path / "partial"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_begun_files_beside_the_target_of_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / ".big-k1ll3d00.pt").write_text("")
    (tmp_path / "adam.pt").symlink_to("elsewhere/big.pt")
    remove_begun([tmp_path / "adam.pt"])
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_removes_files_and_links_but_no_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    remove([tmp_path / "file", tmp_path / "link", tmp_path / "nothing"])
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    with pytest.raises(DataError, match="folder cannot be removed"):
        remove([tmp_path / "folder"])
