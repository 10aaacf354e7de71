from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persample.errors import BatchError, NonFiniteLossError
from persample.experiments.metrics import evaluate_probabilities


def calibration_error(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Return the expected calibration error by its definition, bin by bin."""
    confidence, predicted = probabilities.max(axis=1), probabilities.argmax(axis=1)
    total = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & ((confidence < low + 1 / 15) | (low == 14 / 15))
        if inside.any():
            gap = np.mean(predicted[inside] == targets[inside]) - confidence[inside].mean()
            total += inside.mean() * abs(gap)
    return total


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(2, 10), st.floats(0.1, 20), st.integers(0, 2**32 - 1))
def test_agrees_with_numpy(samples: int, classes: int, scale: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    logits = scale * random.standard_normal((samples, classes))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    targets = random.integers(classes, size=samples)

    metrics = evaluate_probabilities(torch.from_numpy(probabilities), torch.from_numpy(targets))

    assert metrics.accuracy == pytest.approx(np.mean(probabilities.argmax(axis=1) == targets), abs=1e-6)
    assert metrics.log_loss == pytest.approx(np.mean(-np.log(probabilities[range(samples), targets])), rel=1e-9)
    assert metrics.calibration_error == pytest.approx(calibration_error(probabilities, targets), abs=1e-6)


def test_certain_predictions_share_a_bin_with_almost_certain_ones() -> None:
    # In one bin: accuracy 0.5, mean confidence 0.97; in two bins the gaps would add up instead of cancelling.
    probabilities = torch.tensor([[1.0, 0.0], [0.94, 0.06]])

    metrics = evaluate_probabilities(probabilities, torch.tensor([1, 0]))

    assert metrics.calibration_error == pytest.approx(0.47, abs=1e-6)


def test_a_rounding_above_one_is_still_a_probability() -> None:
    above_one = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).item()
    probabilities = torch.tensor([[above_one, 0.0], [0.2, 0.8]])

    metrics = evaluate_probabilities(probabilities, torch.tensor([0, 1]))

    assert metrics.accuracy == 1
    assert metrics.log_loss == pytest.approx(-np.log(0.8) / 2, rel=1e-6)
    assert metrics.calibration_error == pytest.approx(0.1, abs=1e-6)


def test_a_probability_of_zero_leaves_the_log_loss_finite() -> None:
    metrics = evaluate_probabilities(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))

    assert metrics.log_loss == pytest.approx(-np.log(np.finfo(np.float32).tiny), rel=1e-6)


def test_refuses_what_is_no_number() -> None:
    with pytest.raises(NonFiniteLossError, match="smaller lr"):
        evaluate_probabilities(torch.tensor([[float("nan"), 0.5]]), torch.tensor([0]))


@pytest.mark.parametrize(("shape", "targets"), [((0, 2), 0), ((3, 2), 2), ((3,), 3), ((3, 2, 1), 3)])
def test_refuses_shapes_that_do_not_belong_together(shape: tuple[int, ...], targets: int) -> None:
    with pytest.raises(BatchError, match=r"probabilities of shape \(N, C\) and class indices of shape \(N,\), N >= 1"):
        evaluate_probabilities(torch.zeros(shape), torch.zeros(targets, dtype=torch.int64))
