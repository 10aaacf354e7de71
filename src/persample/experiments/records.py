"""The table of metrics: one row per optimizer, epoch, split and kind of prediction."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

from persample.experiments.metrics import Metrics
from persample.experiments.run_folder import writing

OptimizerName = Literal["adam", "vogn"]
Split = Literal["train", "validation", "test"]
Prediction = Literal["point", "mean", "averaged"]


@dataclass(frozen=True)
class Record:
    """The metrics of one model on one part of the data after one epoch.

    Attributes:
        optimizer: What trained the model.
        epoch: How many epochs were trained, from 1.
        split: The part of the data.
        prediction: "point" for Adam's weights; "mean" for VOGN's posterior mean, "averaged" for probabilities
            averaged over draws from VOGN's posterior.
        metrics: The metrics.
    """

    optimizer: OptimizerName
    epoch: int
    split: Split
    prediction: Prediction
    metrics: Metrics


def write_csv(records: Sequence[Record], path: Path) -> None:
    """Write the records as a table of comma-separated values with a header, whole or not at all.

    Args:
        records: The rows, in order.
        path: The file to write; its folder exists.
    """
    columns = [field.name for field in fields(Record) if field.name != "metrics"]
    metrics = [field.name for field in fields(Metrics)]
    with writing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns + metrics)
        writer.writeheader()
        for record in records:
            writer.writerow(row_of(record))


def row_of(record: Record) -> dict[str, Any]:
    """Return a record as a row of the table, by columns."""
    row = asdict(record)
    metrics: dict[str, Any] = row.pop("metrics")
    return row | metrics


def read_csv(path: Path) -> list[Record]:
    """Read a table written by `write_csv`."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Record(
                optimizer=cast(OptimizerName, row["optimizer"]),
                epoch=int(row["epoch"]),
                split=cast(Split, row["split"]),
                prediction=cast(Prediction, row["prediction"]),
                metrics=Metrics(**{metric.name: float(row[metric.name]) for metric in fields(Metrics)}),
            )
            for row in csv.DictReader(file)
        ]
