"""Output that cannot write all characters, closed pipes, full disks: at most one line, and never a traceback."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import pytest

from persample.cli import main

Command: TypeAlias = Callable[..., tuple[int, str]]

TRAIN = ("train", "--optimizer", "adam", "--epochs", "1", "--batch-size", "2000")


@pytest.fixture
def persample(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Return a function that runs the command with a stream as its output: exit code and error output."""
    monkeypatch.chdir(tmp_path)

    def run(stream: io.TextIOBase | None, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["persample", *arguments])
        with contextlib.redirect_stdout(stream), pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "cp437", "utf-8"])
@pytest.mark.parametrize(
    "arguments", [("explain", "mnist-convnet"), ("crosscheck", "--batch-size", "2", "--backend", "hooks"), ("--help",)]
)
def test_every_encoding_can_be_written_to(persample: Command, encoding: str, arguments: tuple[str, ...]) -> None:
    written = io.BytesIO()

    code, err = persample(io.TextIOWrapper(written, encoding=encoding), *arguments)

    assert (code, err) == (0, "")
    text = written.getvalue().decode(encoding)
    assert len(text) > 100
    if arguments[0] == "explain":
        assert ("x1x5x5" if encoding == "ascii" else "×1×5×5") in text or encoding == "cp437"


@pytest.mark.parametrize("name", ["caf\udce9", "ü", "two words"])
def test_paths_of_all_characters(persample: Command, tmp_path: Path, name: str) -> None:
    written = io.BytesIO()

    code, err = persample(io.TextIOWrapper(written, encoding="utf-8"), *TRAIN, "--out", name)

    assert (code, err) == (0, "")
    assert b"Figure: " in written.getvalue()
    assert (tmp_path / name / "figure2.png").exists()


def test_the_reader_of_a_pipe_may_leave(persample: Command) -> None:
    reading, end = os.pipe()
    os.close(reading)
    for arguments in (("explain", "lenet5"), ("--help",), ("backends",), TRAIN):
        with contextlib.suppress(BrokenPipeError), os.fdopen(os.dup(end), "w") as stream:
            assert persample(stream, *arguments) == (1, "")
    os.close(end)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_device(persample: Command) -> None:
    for arguments in (("explain", "lenet5"), ("--help",)):
        with Path("/dev/full").open("w") as stream:
            code, err = persample(stream, *arguments)
        assert (code, err) == (1, "persample: standard output: No space left on device\n")
    with Path("/dev/full").open("w") as stream:
        code, err = persample(stream, "explain", "resnet")
    assert code == 2
    assert err.startswith("persample: no model is called 'resnet'")


def test_no_output_at_all(persample: Command) -> None:
    assert persample(None, "backends") == (0, "")


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """As on a disk that is full after so many bytes."""
    resource = pytest.importorskip("resource", reason="limits of POSIX")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("size", "file"), [(10, "config.json"), (10_000, "adam.pt")])
def test_a_full_disk(persample: Callable[..., tuple[int, str]], tmp_path: Path, size: int, file: str) -> None:
    with no_file_above(size):
        code, err = persample(io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), *TRAIN, "--out", "out")
    assert code == 1
    assert err.startswith(f"persample: out/{file} cannot be written: ")
    assert err.count("\n") == 1
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
