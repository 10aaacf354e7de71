"""Pictures of predictions and of trainings, by matplotlib, which is imported when something is drawn.

Each function draws into `ax`, by default pyplot's current one, and returns it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from persample.errors import BatchError, DataError, MissingPackageError, OptionError
from persample.metrics import calibration_bins, require_bins
from persample.vogn.prediction import GaussianPrediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours of Okabe and Ito, told apart with every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

# Of each kind of prediction in a table of metrics: label, colour, and a line style that tells it apart in grey.
_CURVES = {
    "point": ("Adam", "#D55E00", "-"),
    "averaged": ("VOGN, predictions averaged over the posterior", "#0072B2", "-"),
    "mean": ("VOGN, posterior mean", "#56B4E9", "--"),
}
_METRICS = {"accuracy": "Accuracy", "log_loss": "Log loss (nats)", "calibration_error": "Calibration error"}


def reliability_diagram(
    probabilities: Tensor, targets: Tensor, *, bins: int = 15, label: str | None = None, ax: Axes | None = None
) -> Axes:
    """Draw the accuracy over the confidence: on the diagonal, predictions are as often right as they say.

    Samples are put in bins of equal width by the probability of their most probable class, as for
    `persample.metrics.calibration_error`. The area of a dot is the share of the samples in its bin. Several calls with
    a label each compare methods. Source: DeGroot and Fienberg, 1983; Guo et al., "On Calibration of Modern Neural
    Networks", ICML 2017.

    Args:
        probabilities: of the classes, shape `(N, C)`.
        targets: class indices, shape `(N,)`.
        bins: their number.
        label: what the legend calls it; None is no legend.
        ax: where to draw.

    Raises:
        BatchError: they are no probabilities and class indices of these shapes.
        OptionError: `bins` is below 1.
        MissingPackageError: matplotlib is not installed.
    """
    count, confident, right = (sums.cpu() for sums in calibration_bins(probabilities, targets, bins))
    ax = _axes(ax)
    filled = count > 0
    confidence, accuracy = confident[filled] / count[filled], right[filled] / count[filled]
    if not any(line.get_gid() == "diagonal" for line in ax.get_lines()):
        ax.plot([0, 1], [0, 1], color="0.6", linestyle=":", gid="diagonal")
    colour = COLOURS[len(ax.collections) % len(COLOURS)]
    ax.plot(confidence.tolist(), accuracy.tolist(), color=colour, label=label)
    ax.scatter(confidence.tolist(), accuracy.tolist(), s=(300 * count[filled] / count.sum()).tolist(), color=colour)
    ax.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
    return _with_legend(ax, label)


def entropy_histogram(entropies: Tensor | Mapping[str, Tensor], *, bins: int = 30, ax: Axes | None = None) -> Axes:
    """Draw how the entropy of predictions is spread, of one set of samples or of several, as densities.

    Args:
        entropies: of the predictions, shape `(N,)`; or several by name, for example
            `{"digits": inside.entropy, "clothes": outside.entropy}`.
        bins: their number, the same bins for all.
        ax: where to draw.

    Raises:
        BatchError: one is empty, or holds what is not finite.
        OptionError: `bins` is below 1.
        MissingPackageError: matplotlib is not installed.
    """
    require_bins(bins)
    named = dict(entropies) if isinstance(entropies, Mapping) else {"": entropies}
    values = {name: torch.as_tensor(given).detach().flatten().double().cpu() for name, given in named.items()}
    for name, tensor in values.items():
        if not len(tensor) or not bool(tensor.isfinite().all()):
            raise BatchError(f"The entropies {name!r} must be finite numbers, at least one.")
    ax = _axes(ax)
    largest = max(float(tensor.max()) for tensor in values.values())
    edges = torch.linspace(0, largest or 1.0, bins + 1, dtype=torch.float64).tolist()
    for index, (name, tensor) in enumerate(values.items()):
        colour = COLOURS[index % len(COLOURS)]
        ax.hist(tensor.tolist(), edges, density=True, alpha=0.6, color=colour, label=name or None)
    ax.set(xlabel="entropy of the prediction (nats)", ylabel="density")
    return _with_legend(ax, any(named))


def uncertainty_band(
    inputs: Tensor, prediction: GaussianPrediction, *, widths: float = 2.0, ax: Axes | None = None
) -> Axes:
    """Draw a curve with two bands: what more data would reduce, and around it the noise of the observations.

    Args:
        inputs: one number for each sample, shape `(N,)` or `(N, 1)`, in any order.
        prediction: what was predicted for them, one number each.
        widths: half of the width of the bands, in standard deviations.
        ax: where to draw.

    Raises:
        BatchError: there is more than one number for a sample.
        OptionError: it is no prediction of numbers.
        MissingPackageError: matplotlib is not installed.
    """
    if not isinstance(prediction, GaussianPrediction):
        raise OptionError(
            f"prediction is of type {type(prediction).__name__}, without mean and variance: pass that of "
            "predict_gaussian(), or of predict() with a likelihood of real numbers, such as "
            "persample.likelihoods.Gaussian(noise_precision)."
        )
    parts = (inputs, prediction.mean, prediction.epistemic_variance, prediction.aleatoric_variance)
    if any(part.numel() != len(inputs) for part in parts):
        raise BatchError(
            "uncertainty_band draws one number over one number, but inputs and predictions have the shapes "
            f"{tuple(inputs.shape)} and {tuple(prediction.mean.shape)}: pick an output, or plot a slice."
        )
    order = inputs.flatten().argsort()
    x, mean, epistemic, aleatoric = (part.detach().flatten()[order].double().cpu() for part in parts)
    ax = _axes(ax)
    for variance, alpha, name in (
        (epistemic + aleatoric, 0.18, "with the observations' noise"),
        (epistemic, 0.4, "of the function"),
    ):
        half = widths * variance.sqrt()
        label = f"±{widths:g} σ {name}"
        ax.fill_between(
            x.tolist(), (mean - half).tolist(), (mean + half).tolist(), alpha=alpha, color=COLOURS[0], lw=0, label=label
        )
    ax.plot(x.tolist(), mean.tolist(), color=COLOURS[0], label="mean")
    return _with_legend(ax, True)


def training_curves(
    metrics: str | PathLike[str] | Iterable[Mapping[str, Any]],
    metric: str = "log_loss",
    *,
    split: str = "test",
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw a metric over the epochs, one curve for each kind of prediction.

    Args:
        metrics: the file `metrics.csv` of a run of the experiment, or its rows: the columns "epoch", "split",
            "prediction", and the metric.
        metric: the column to draw, such as "log_loss" or "accuracy".
        split: the part of the data, "train", "validation" or "test".
        legend: whether to name the curves.
        ax: where to draw.

    Raises:
        DataError: there is no such file, no such column, or no row of that part of the data.
        MissingPackageError: matplotlib is not installed.
    """
    rows = _rows_of(metrics) if isinstance(metrics, str | PathLike) else list(metrics)
    if missing := [name for name in ("epoch", "split", "prediction", metric) if rows and name not in rows[0]]:
        raise DataError(f"The table of metrics has no column {missing[0]!r}; it has {', '.join(rows[0])}.")
    chosen = [row for row in rows if row["split"] == split]
    if not chosen:
        there = ", ".join(sorted({repr(row["split"]) for row in rows})) or "no row"
        raise DataError(f"The table of metrics has no row with split={split!r}; it has {there}.")
    ax = _axes(ax)
    kinds = [kind for kind in _CURVES if any(row["prediction"] == kind for row in chosen)]
    kinds += sorted({row["prediction"] for row in chosen} - _CURVES.keys())
    for index, kind in enumerate(kinds):
        label, colour, style = _CURVES.get(kind, (kind, COLOURS[index % len(COLOURS)], "-"))
        points = sorted((int(row["epoch"]), float(row[metric])) for row in chosen if row["prediction"] == kind)
        epochs, values = zip(*points, strict=True)
        ax.plot(epochs, values, style, marker=".", color=colour, label=label, linewidth=2)
    ax.grid(alpha=0.3)
    ax.locator_params(axis="x", integer=True)
    ax.set(xlabel="Epoch", ylabel=_METRICS.get(metric, metric))
    return _with_legend(ax, legend)


def _rows_of(path: str | PathLike[str]) -> list[Mapping[str, Any]]:
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise DataError(f"The table of metrics cannot be read: {error}.") from error


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingPackageError(
            f'persample.plots needs matplotlib ({error}); run: pip install "persample[plots]"'
        ) from error
    return pyplot.gca()


def _with_legend(ax: Axes, wanted: object) -> Axes:
    if wanted:
        ax.legend(framealpha=0.8, edgecolor="none")  # it may lie over what is drawn
    return ax
