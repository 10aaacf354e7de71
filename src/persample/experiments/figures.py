"""The paper's Figure 2: accuracy and log loss of both optimizers by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from persample.errors import OptionError
from persample.experiments.extras import require
from persample.experiments.records import Prediction, Record, Split
from persample.experiments.run_folder import writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours of Okabe and Ito, told apart with every kind of colour vision; line styles tell them apart in grey.
_CURVES: dict[Prediction, tuple[str, str, str]] = {
    "point": ("Adam", "#D55E00", "-"),
    "averaged": ("VOGN, predictions averaged over the posterior", "#0072B2", "-"),
    "mean": ("VOGN, posterior mean", "#56B4E9", "--"),
}
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
    rows = [split for split in _ROWS if split in measured]
    axes = figure.subplots(len(rows), len(_COLUMNS), sharex=True, sharey="col", squeeze=False)
    for row, split in enumerate(rows):
        for column, metric in enumerate(_COLUMNS):
            _draw(axes[row, column], [r for r in records if r.split == split], metric)
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


def _draw(axes: Axes, records: Sequence[Record], metric: str) -> None:
    for prediction, (label, colour, style) in _CURVES.items():
        points = sorted((r.epoch, getattr(r.metrics, metric)) for r in records if r.prediction == prediction)
        if points:
            epochs, values = zip(*points, strict=True)
            axes.plot(epochs, values, style, marker=".", color=colour, label=label, linewidth=2)
    axes.grid(alpha=0.3)
    axes.locator_params(axis="x", integer=True)
