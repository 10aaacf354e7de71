"""The metrics of an experiment: accuracy, log loss and calibration error of class probabilities."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from persample.errors import NonFiniteLossError
from persample.metrics import calibration_error, log_loss


@dataclass(frozen=True)
class Metrics:
    """Three averages over a part of a data set.

    Attributes:
        accuracy: Share of the samples whose most probable class is the right one, from 0 to 1.
        log_loss: Mean negative log-probability of the right class, in nats; see `persample.metrics.log_loss`.
        calibration_error: From 0 to 1, in 15 bins; see `persample.metrics.calibration_error`.
    """

    accuracy: float
    log_loss: float
    calibration_error: float


def evaluate_probabilities(probabilities: Tensor, targets: Tensor) -> Metrics:
    """Compare predicted class probabilities with the true classes.

    Args:
        probabilities: (N, C), each row a distribution over C classes.
        targets: (N,) int64, the true classes.

    Raises:
        BatchError: There are no samples, or the shapes do not belong together.
        NonFiniteLossError: A probability is not a number.
    """
    if not probabilities.isfinite().all():
        raise NonFiniteLossError("the model predicts probabilities that are not numbers; train with a smaller lr")
    return Metrics(
        log_loss=log_loss(probabilities, targets),
        calibration_error=calibration_error(probabilities, targets),
        accuracy=(probabilities.argmax(1) == targets).double().mean().item(),
    )
