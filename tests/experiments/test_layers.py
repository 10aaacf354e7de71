from __future__ import annotations

import csv
from pathlib import Path

import torch
from torch import nn

from persample.experiments.layers import LayerRecord, layer_records, write_layers_csv
from persample.losses import cross_entropy
from persample.vogn import VOGN, LayerDiagnostics


def test_a_row_for_each_parameter_with_a_posterior() -> None:
    model = nn.Linear(3, 2)
    vogn = VOGN(model, cross_entropy, data_size=10)
    rows = layer_records("vogn", 4, vogn)
    assert [(row.epoch, row.layer, row.skipped_steps) for row in rows] == [(4, "weight", 0), (4, "bias", 0)]
    assert rows[0].diagnostics == vogn.diagnostics().layers["weight"]
    assert layer_records("adam", 4, torch.optim.Adam(model.parameters())) == []


def test_no_digit_is_lost(tmp_path: Path) -> None:
    row = LayerRecord("vogn", 2, "0.weight", 1, LayerDiagnostics(1 / 3, 2 / 3, 1e-17, 0.0, 5.0))
    write_layers_csv([row], tmp_path / "diagnostics.csv")
    with (tmp_path / "diagnostics.csv").open(newline="") as file:
        (read,) = csv.DictReader(file)
    assert list(read) == [
        "optimizer",
        "epoch",
        "layer",
        "skipped_steps",
        "effective_lr",
        "signal_to_noise",
        "scale",
        "smallest_scale",
        "largest_scale",
    ]
    numbers = [float(read[name]) for name in list(read)[4:]]
    assert LayerDiagnostics(*numbers) == row.diagnostics
