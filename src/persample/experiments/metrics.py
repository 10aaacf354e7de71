"""How good predicted class probabilities are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from persample.errors import BatchError, NonFiniteLossError
from persample.experiments.extras import require

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Metrics:
    """Three averages over a part of a data set.

    Attributes:
        accuracy: Share of the samples whose most probable class is the right one, from 0 to 1.
        log_loss: Mean negative log-probability of the right class, in nats.
        calibration_error: Expected calibration error of the most probable class (Naeini et al., 2015), from 0
            to 1: samples are put in 15 bins of equal width by the probability of their most probable class,
            and the gaps between mean probability and accuracy are averaged with the bins' shares of samples.
    """

    accuracy: float
    log_loss: float
    calibration_error: float


def evaluate_probabilities(probabilities: Tensor, targets: Tensor) -> Metrics:
    """Compare predicted class probabilities with the true classes.

    A probability of exactly 0 counts as the smallest normal number of its dtype: else one sample, by rounding
    alone, could make the log loss infinite.

    Args:
        probabilities: (N, K), each row a distribution over K classes.
        targets: (N,) int64, the true classes.

    Returns:
        The metrics as Python floats.

    Raises:
        BatchError: There are no samples, or the shapes do not belong together.
        NonFiniteLossError: A probability is not a number.
        MissingPackageError: torchmetrics is not installed.
    """
    if probabilities.ndim != 2 or targets.shape != probabilities.shape[:1] or not len(targets):
        raise BatchError(
            "metrics want probabilities (N, K) and targets (N,) with N ≥ 1, but got "
            f"{tuple(probabilities.shape)} and {tuple(targets.shape)}"
        )
    if not probabilities.isfinite().all():
        raise NonFiniteLossError("the model predicts probabilities that are not numbers; train with a smaller lr")
    classification = require("torchmetrics.functional.classification", "The metrics")
    classes = probabilities.shape[1]
    # torchmetrics takes everything for logits when one entry lies above 1, be it by one rounding.
    bounded = probabilities.clamp(0, 1)
    # It bins in float32, and those of exactly 1 in a bin of their own: keep them with the others of the last.
    below_one = bounded.float().clamp(max=1 - torch.finfo(torch.float32).eps / 2)
    return Metrics(
        accuracy=classification.multiclass_accuracy(bounded, targets, classes, average="micro").item(),
        log_loss=_log_loss(bounded, targets),
        calibration_error=classification.multiclass_calibration_error(
            below_one, targets, classes, n_bins=CALIBRATION_BINS
        ).item(),
    )


def _log_loss(probabilities: Tensor, targets: Tensor) -> float:
    right = probabilities.gather(1, targets[:, None]).clamp(min=torch.finfo(probabilities.dtype).tiny)
    return right.log().neg().mean().item()
