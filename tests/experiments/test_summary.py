from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from persample.errors import DataError, OptionError
from persample.experiments.metrics import Metrics
from persample.experiments.recipes import configure
from persample.experiments.records import Record, write_csv
from persample.experiments.summary import last_records


def folder_of(root: Path, seed: int, log_loss: float, **changes: Any) -> Path:
    folder = root / f"{seed}-{log_loss}"
    folder.mkdir()
    config = configure("mnist", "adam", seed, epochs=2, **changes)
    (folder / "config.json").write_text(json.dumps({"runs": [config.as_dict()]}))
    records = [
        Record("adam", epoch, split, "point", Metrics(0.5, log_loss / epoch, 0.25))
        for epoch in (1, 2)
        for split in ("train", "test")
    ]
    write_csv(records, folder / "metrics.csv")
    return folder


def test_takes_the_last_epoch_of_each_run(tmp_path: Path) -> None:
    runs = last_records([folder_of(tmp_path, 0, 1.0), folder_of(tmp_path, 1, 3.0)])

    assert [[(r.epoch, r.split, r.metrics.log_loss) for r in run] for run in runs] == [
        [(2, "train", 0.5), (2, "test", 0.5)],
        [(2, "train", 1.5), (2, "test", 1.5)],
    ]


def test_refuses_runs_that_differ_in_more_than_the_seed(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="that differ in nothing but the seed"):
        last_records([folder_of(tmp_path, 0, 1.0), folder_of(tmp_path, 1, 3.0, lr=0.5)])


def test_refuses_one_seed_twice(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"seed of .*3\.0 was used twice"):
        last_records([folder_of(tmp_path, 0, 1.0), folder_of(tmp_path, 0, 3.0)])


@pytest.mark.parametrize("missing", ["config.json", "metrics.csv"])
def test_refuses_a_run_that_was_not_finished(tmp_path: Path, missing: str) -> None:
    folder = folder_of(tmp_path, 0, 1.0)
    (folder / missing).unlink()

    with pytest.raises(DataError, match=rf"there is no .*{missing}: the run has not finished"):
        last_records([folder])


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b'{"runs": 3}'),
        ("config.json", b'{"runs": [{"lr": 1}]}'),
        ("config.json", b"\xff\xfe"),
        ("metrics.csv", b""),
        ("metrics.csv", b"a,b\n1,2\n"),
        (
            "metrics.csv",
            b"optimizer,epoch,split,prediction,accuracy,log_loss,calibration_error\nadam,1,test,point,x,1,1\n",
        ),
        ("metrics.csv", b"optimizer,epoch,split,prediction,accuracy,log_loss,calibration_error\nadam,1\n"),
        ("metrics.csv", b"\xff\xfe"),
    ],
)
def test_refuses_damaged_files(tmp_path: Path, file: str, content: bytes) -> None:
    folder = folder_of(tmp_path, 0, 1.0)
    (folder / file).write_bytes(content)

    with pytest.raises(DataError, match=rf"{file} is not a file of a run, or is damaged .*--overwrite"):
        last_records([folder])


def test_refuses_runs_that_measured_something_else(tmp_path: Path) -> None:
    folders = [folder_of(tmp_path, 0, 1.0), folder_of(tmp_path, 1, 3.0)]
    lines = (folders[1] / "metrics.csv").read_text().splitlines(keepends=True)
    (folders[1] / "metrics.csv").write_text("".join(lines[:-1]))

    with pytest.raises(DataError, match="have different metrics"):
        last_records(folders)
