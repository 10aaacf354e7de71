from __future__ import annotations

import csv
from pathlib import Path

from persample.experiments.metrics import Metrics
from persample.experiments.records import Record, read_csv, write_csv


def test_writes_a_row_per_record_without_losing_a_digit(tmp_path: Path) -> None:
    records = [
        Record("adam", 1, "train", "point", Metrics(1 / 3, 2 / 3, 1e-17)),
        Record("vogn", 2, "test", "averaged", Metrics(0.5, 1.5, 0.25)),
    ]

    write_csv(records, tmp_path / "metrics.csv")

    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "optimizer",
        "epoch",
        "split",
        "prediction",
        "accuracy",
        "log_loss",
        "calibration_error",
    ]
    assert float(rows[0]["log_loss"]) == 2 / 3
    assert read_csv(tmp_path / "metrics.csv") == records
