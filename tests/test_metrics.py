"""Metrics against torchmetrics, and against loops over all samples and pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from persample import metrics
from persample.errors import BatchError, OptionError
from persample.testing.devices import generator_of


@pytest.mark.parametrize("seed", range(4))
def test_of_classes(seed: int) -> None:
    g = generator_of(seed)
    p = (3 * torch.randn(200, 4, generator=g, dtype=torch.float64)).softmax(1)
    y = torch.randint(4, (200,), generator=g)
    pairs = list(zip(p.tolist(), y.tolist(), strict=True))
    assert metrics.log_loss(p, y) == pytest.approx(-np.mean([np.log(row[c]) for row, c in pairs]))
    squares = [sum((q - (k == c)) ** 2 for k, q in enumerate(row)) for row, c in pairs]
    assert metrics.brier_score(p, y) == pytest.approx(np.mean(squares))
    classification = pytest.importorskip("torchmetrics.functional.classification")
    due = classification.multiclass_calibration_error(p, y, 4, n_bins=15).item()
    assert metrics.calibration_error(p, y) == pytest.approx(due, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_of_uncertainties(seed: int) -> None:
    """Whole numbers, so that there are ties."""
    g = generator_of(seed)
    inside, outside = torch.randint(8, (60,), generator=g).double(), torch.randint(3, 12, (37,), generator=g).double()
    wins = [(b > a) + 0.5 * (b == a) for a in inside.tolist() for b in outside.tolist()]
    assert metrics.auroc(inside, outside) == pytest.approx(np.mean(wins))
    threshold = min(t for t in range(13) if (inside <= t).double().mean() >= 0.95)
    assert metrics.fpr95(inside, outside) == pytest.approx((outside <= threshold).double().mean().item())


def test_extremes() -> None:
    low, high = torch.tensor([0.1, 0.2]), torch.tensor([0.8, 0.9, 0.7])
    assert (metrics.auroc(low, high), metrics.auroc(high, low), metrics.auroc(low, low)) == (1.0, 0.0, 0.5)
    assert (metrics.fpr95(low, high), metrics.fpr95(high, low)) == (0.0, 1.0)
    sure = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert metrics.calibration_error(sure, torch.tensor([0, 1])) == 0.0
    assert np.isfinite(metrics.log_loss(sure, torch.tensor([1, 0])))


def test_refusals() -> None:
    p = torch.full((3, 2), 0.5)
    for targets in (torch.zeros(2).long(), torch.zeros(3, 1).long()):
        for metric in (metrics.log_loss, metrics.brier_score, metrics.calibration_error):
            with pytest.raises(BatchError, match=r"shape \(N, C\)"):
                metric(p, targets)
    with pytest.raises(OptionError, match="bins=0"):
        metrics.calibration_error(p, torch.zeros(3).long(), bins=0)
    for scores in (torch.zeros(0), torch.zeros(2, 2), torch.tensor([float("nan")])):
        with pytest.raises(BatchError, match="outside must be a vector"):
            metrics.auroc(torch.zeros(3), scores)
