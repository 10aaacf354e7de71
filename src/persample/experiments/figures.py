"""The paper's Figure 2: accuracy and log loss of both optimizers by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from persample.errors import OptionError
from persample.experiments.extras import require
from persample.experiments.records import Record, Split, row_of
from persample.experiments.run_folder import writing
from persample.plots import training_curves

_COLUMNS = {"accuracy": "Accuracy (higher is better)", "log_loss": "Log loss in nats (lower is better)"}
_ROWS: dict[Split, str] = {"train": "Training data", "validation": "Validation data", "test": "Test data"}


def figure2(records: Sequence[Record], path: Path, title: str) -> None:
    """Draw accuracy and log loss on training and test data over epochs, in the manner of the paper's Figure 2.

    Args:
        records: The metrics of any of the optimizers; what is not there is not drawn.
        path: The picture to write, in the format of its suffix; its folder exists. It is written whole or not
            at all.
        title: The headline.

    Raises:
        OptionError: There are no records.
        MissingPackageError: matplotlib is not installed.
    """
    if not records:
        raise OptionError("there is nothing to draw in figure 2: records is empty; train for at least one epoch")
    figure = require("matplotlib.figure", "Figures").Figure(figsize=(10, 7), layout="constrained")
    measured = {record.split for record in records}
    table = [row_of(record) for record in records]
    rows = [split for split in _ROWS if split in measured]
    axes = figure.subplots(len(rows), len(_COLUMNS), sharex=True, sharey="col", squeeze=False)
    for row, split in enumerate(rows):
        for column, metric in enumerate(_COLUMNS):
            training_curves(table, metric, split=split, legend=False, ax=axes[row, column])
            axes[row, column].set(xlabel="", ylabel="")
    for column, heading in enumerate(_COLUMNS.values()):
        axes[0, column].set_title(heading)
        axes[-1, column].set_xlabel("Epoch")
    for row, split in enumerate(rows):
        axes[row, 0].set_ylabel(_ROWS[split], fontsize="large")
    figure.suptitle(title, fontsize="x-large")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False)
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=300)  # that of print
