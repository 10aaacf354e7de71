"""Metrics against torchmetrics, and against loops over all samples and pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from persample import metrics
from persample.errors import BatchError, OptionError
from persample.testing.devices import generator_of

Metric = Callable[[Any, Any], float]


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
    for bins in (0, 2.5):
        with pytest.raises(OptionError, match=f"bins={bins}"):
            metrics.calibration_error(p, torch.zeros(3).long(), bins=bins)  # type: ignore[arg-type]
    for scores in (torch.zeros(0), torch.zeros(2, 2), torch.tensor([float("nan")])):
        with pytest.raises(BatchError, match="outside must be a vector"):
            metrics.auroc(torch.zeros(3), scores)


@pytest.mark.parametrize("metric", [metrics.log_loss, metrics.brier_score, metrics.calibration_error])
class TestOfWrongClasses:
    def test_logits_are_no_probabilities(self, metric: Metric) -> None:
        logits = torch.randn(5, 3, generator=generator_of(0))
        for values in (logits, logits.log_softmax(1), logits.exp(), logits.softmax(1).round().long()):
            with pytest.raises(BatchError, match=r"pass logits\.softmax\(1\)"):
                metric(values, torch.zeros(5).long())

    def test_probabilities_in_half_precision_are(self, metric: Metric) -> None:
        p = torch.randn(50, 1000, generator=generator_of(0)).softmax(1)
        y = torch.arange(50)
        for dtype in (torch.float16, torch.bfloat16):
            assert metric(p.to(dtype), y) == pytest.approx(metric(p, y), rel=0.02, abs=1e-3)

    def test_targets_that_are_no_classes(self, metric: Metric) -> None:
        p = torch.full((3, 2), 0.5)
        for targets in (torch.tensor([0, 1, 2]), torch.tensor([0, -100, 1]), torch.zeros(3)):
            with pytest.raises(BatchError, match="from 0 to 1, the indices of the classes"):
                metric(p, targets)

    def test_arrays_and_other_whole_numbers(self, metric: Metric) -> None:
        p = torch.randn(6, 3, generator=generator_of(0), dtype=torch.float64).softmax(1)
        y = torch.tensor([0, 1, 2, 0, 1, 2])
        due = metric(p, y)
        assert metric(p.numpy(), y.numpy()) == metric(p, y.int()) == metric(p, y.to(torch.uint8)) == due

    def test_what_is_not_a_number_gives_none(self, metric: Metric) -> None:
        assert np.isnan(metric(torch.full((3, 2), float("nan")), torch.zeros(3).long()))
