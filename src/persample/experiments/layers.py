"""The table of posterior diagnostics: one row per optimizer, epoch and parameter of the model."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from persample.experiments.records import OptimizerName
from persample.experiments.run_folder import writing
from persample.vogn import LayerDiagnostics, VariationalOptimizer


@dataclass(frozen=True)
class LayerRecord:
    """How the training of one parameter of the model went in one epoch.

    Attributes:
        optimizer: What trained the model.
        epoch: How many epochs were trained, from 1.
        layer: The name of the parameter.
        skipped_steps: How many steps were skipped until then.
        diagnostics: The numbers.
    """

    optimizer: OptimizerName
    epoch: int
    layer: str
    skipped_steps: int
    diagnostics: LayerDiagnostics


def layer_records(name: OptimizerName, epoch: int, optimizer: object) -> list[LayerRecord]:
    """Return a row for each parameter; none if the optimizer has no posterior."""
    if not isinstance(optimizer, VariationalOptimizer):
        return []
    found = optimizer.diagnostics()
    return [LayerRecord(name, epoch, layer, found.skipped_steps, numbers) for layer, numbers in found.layers.items()]


def write_layers_csv(records: Sequence[LayerRecord], path: Path) -> None:
    """Write the rows as a table of comma-separated values with a header, whole or not at all.

    Args:
        records: The rows, in order.
        path: The file to write; its folder exists.
    """
    columns = [field.name for field in fields(LayerRecord) if field.name != "diagnostics"]
    numbers = [field.name for field in fields(LayerDiagnostics)]
    with writing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns + numbers)
        writer.writeheader()
        for record in records:
            row = {column: getattr(record, column) for column in columns}
            writer.writerow(row | asdict(record.diagnostics))
