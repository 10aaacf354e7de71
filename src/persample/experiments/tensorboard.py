"""Writing metrics and diagnostics for TensorBoard."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from persample.experiments.extras import require
from persample.experiments.layers import LayerRecord
from persample.experiments.records import Record


def write_tensorboard(records: Sequence[Record], layers: Sequence[LayerRecord], folder: Path) -> None:
    """Write the metrics and the diagnostics of all epochs as scalars, replacing those of an earlier call.

    Args:
        records: The metrics: `optimizer/split/prediction/metric`.
        layers: The diagnostics: `optimizer/layer/number`.
        folder: Where to write; `tensorboard --logdir` takes it.

    Raises:
        MissingPackageError: TensorBoard is not installed.
    """
    require("tensorboard", "Writing for TensorBoard")
    from torch.utils.tensorboard import SummaryWriter

    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    with SummaryWriter(str(partial)) as writer:
        for record in records:
            for name, value in asdict(record.metrics).items():
                tag = f"{record.optimizer}/{record.split}/{record.prediction}/{name}"
                writer.add_scalar(tag, value, record.epoch)
        for layer in layers:
            writer.add_scalar(f"{layer.optimizer}/skipped_steps", layer.skipped_steps, layer.epoch)
            for name, value in asdict(layer.diagnostics).items():
                writer.add_scalar(f"{layer.optimizer}/{layer.layer}/{name}", value, layer.epoch)
    if folder.exists():
        shutil.rmtree(folder)
    partial.replace(folder)
