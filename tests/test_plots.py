"""The pictures: what is drawn where, read from the axes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import persample
from persample import metrics, plots
from persample.errors import BatchError, DataError, OptionError
from persample.testing.devices import generator_of
from persample.vogn import ClassPrediction, GaussianPrediction

figure = pytest.importorskip("matplotlib.figure")


@pytest.fixture
def ax() -> Iterator[Any]:
    return figure.Figure().subplots()


def test_reliability_diagram(ax: Any) -> None:
    """Two bins by hand: confidences 0.6 and 0.7 of which one is right, 0.9 which is right."""
    probabilities = torch.tensor([[0.6, 0.4], [0.3, 0.7], [0.9, 0.1]])
    targets = torch.tensor([0, 0, 0])
    assert plots.reliability_diagram(probabilities, targets, bins=4, label="hand", ax=ax) is ax
    diagonal, curve = ax.get_lines()
    assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]
    torch.testing.assert_close(torch.tensor(curve.get_xydata()), torch.tensor([[0.65, 0.5], [0.9, 1.0]]).double())
    torch.testing.assert_close(torch.tensor(ax.collections[0].get_sizes()), torch.tensor([200.0, 100.0]).double())
    plots.reliability_diagram(probabilities, targets, label="other", ax=ax)
    assert len(ax.get_lines()) == 3  # one diagonal
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["hand", "other"]
    assert ax.get_lines()[1].get_color() != ax.get_lines()[2].get_color()


def test_the_diagram_and_the_error_have_the_same_bins(ax: Any) -> None:
    probabilities = torch.rand(500, 4, generator=generator_of(0)).softmax(1)
    targets = torch.randint(4, (500,), generator=generator_of(1))
    plots.reliability_diagram(probabilities, targets, bins=40, ax=ax)
    points, sizes = torch.tensor(ax.get_lines()[1].get_xydata()), torch.tensor(ax.collections[0].get_sizes())
    error = (sizes / 300 * (points[:, 0] - points[:, 1]).abs()).sum().item()
    assert error == pytest.approx(metrics.calibration_error(probabilities, targets, bins=40), abs=1e-12)


def test_entropy_histogram(ax: Any) -> None:
    entropies = {"inside": torch.tensor([0.0, 0.1, 0.9]), "outside": torch.tensor([2.0])}
    assert plots.entropy_histogram(entropies, bins=2, ax=ax) is ax
    heights = [patch.get_height() for patch in ax.patches]
    assert heights == [1.0, 0.0, 0.0, 1.0]  # densities over bins of width 1
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["inside", "outside"]
    alone = figure.Figure().subplots()
    assert plots.entropy_histogram(torch.zeros(3), ax=alone).get_legend() is None
    with pytest.raises(OptionError, match="bins=0"):
        plots.entropy_histogram(torch.zeros(3), bins=0, ax=ax)
    for wrong in (torch.zeros(0), torch.tensor([float("nan")])):
        with pytest.raises(BatchError, match="'far'"):
            plots.entropy_histogram({"far": wrong}, ax=ax)


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_uncertainty_band(ax: Any, shape: tuple[int, ...]) -> None:
    """In the order of the inputs, ±1 σ: σ² = 4 of the function, and 5 more of the noise."""
    inputs = torch.tensor([2.0, 0.0, 1.0]).reshape(shape)
    mean, ones = (10 * inputs), torch.ones(shape)
    prediction = GaussianPrediction(mean, 4 * ones, 5 * ones)
    assert plots.uncertainty_band(inputs, prediction, widths=1.0, ax=ax) is ax
    assert ax.get_lines()[0].get_xydata().tolist() == [[0, 0], [1, 10], [2, 20]]
    outer, inner = (collection.get_paths()[0].vertices for collection in ax.collections)
    assert (outer[:, 1].min(), outer[:, 1].max()) == (-3, 23)
    assert (inner[:, 1].min(), inner[:, 1].max()) == (-2, 22)
    classes = ClassPrediction(torch.full((3, 2), 0.5), torch.zeros(3), torch.zeros(3))
    with pytest.raises(OptionError, match=r"of type ClassPrediction.*predict_gaussian\(\)"):
        plots.uncertainty_band(inputs, classes, ax=ax)  # type: ignore[arg-type]
    with pytest.raises(BatchError, match="one number"):
        plots.uncertainty_band(torch.zeros(3, 2), GaussianPrediction(mean, ones, ones), ax=ax)


def test_training_curves(ax: Any, tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    rows = [("vogn", 2, "averaged", 0.5), ("vogn", 1, "averaged", 0.7), ("adam", 1, "point", 0.9), ("x", 1, "swag", 1)]
    lines = [f"{optimizer},{epoch},test,{kind},{loss}" for optimizer, epoch, kind, loss in rows]
    path.write_text("\n".join(["optimizer,epoch,split,prediction,log_loss", *lines]), encoding="utf-8")
    assert plots.training_curves(path, ax=ax) is ax
    curves = {line.get_label(): line.get_xydata().tolist() for line in ax.get_lines()}
    assert curves == {
        "Adam": [[1, 0.9]],
        "VOGN, predictions averaged over the posterior": [[1, 0.7], [2, 0.5]],
        "swag": [[1, 1]],
    }
    assert {text.get_text() for text in ax.get_legend().get_texts()} == curves.keys()
    with pytest.raises(DataError, match=r"no column 'brier'; it has optimizer, epoch"):
        plots.training_curves(path, "brier", ax=ax)
    with pytest.raises(DataError, match=r"split='train'; it has 'test'"):
        plots.training_curves(path, split="train", ax=ax)
    with pytest.raises(DataError, match="cannot be read"):
        plots.training_curves(tmp_path / "none.csv", ax=ax)


def test_without_axes_the_current_ones_are_drawn_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    from matplotlib import pyplot

    made = pyplot.figure()
    assert persample.plots.entropy_histogram(torch.zeros(3)) is made.gca()
    pyplot.close(made)
