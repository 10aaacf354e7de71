"""Metrics of class probabilities, and of uncertainty as a detector of out-of-distribution samples.

All take tensors (or arrays of NumPy), and return a Python float, averaged in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from persample.errors import BatchError, OptionError


def log_loss(probabilities: Tensor, targets: Tensor) -> float:
    """Mean of −log p(target), in nats.

    A probability of exactly 0 counts as the smallest normal number of its dtype.

    Args:
        probabilities: of the classes, shape `(N, C)`.
        targets: class indices, shape `(N,)`.

    Raises:
        BatchError: they are no probabilities and class indices of these shapes.
    """
    probabilities, targets = _classes(probabilities, targets)
    of_targets = probabilities.gather(1, targets[:, None]).clamp(min=torch.finfo(probabilities.dtype).tiny)
    return -of_targets.double().log().mean().item()


def brier_score(probabilities: Tensor, targets: Tensor) -> float:
    """Mean over samples of Σ_c (p_c − 1[c = target])², from 0 to 2 (Brier, 1950).

    Args:
        probabilities: of the classes, shape `(N, C)`.
        targets: class indices, shape `(N,)`.

    Raises:
        BatchError: they are no probabilities and class indices of these shapes.
    """
    probabilities, targets = _classes(probabilities, targets)
    distance = probabilities.double().scatter_add(1, targets[:, None], -torch.ones_like(targets[:, None]).double())
    return distance.square().sum(1).mean().item()


def calibration_error(probabilities: Tensor, targets: Tensor, *, bins: int = 15) -> float:
    """Expected calibration error of the most probable class (Naeini et al., 2015; Guo et al., 2017), from 0 to 1.

    Samples are put in bins of equal width by the probability of their most probable class; the gaps between its mean
    and the accuracy are averaged with the shares of the samples.

    Args:
        probabilities: of the classes, shape `(N, C)`.
        targets: class indices, shape `(N,)`.
        bins: their number.

    Raises:
        BatchError: they are no probabilities and class indices of these shapes.
        OptionError: `bins` is below 1.
    """
    count, confidence, right = calibration_bins(probabilities, targets, bins)
    return ((confidence - right).abs().sum() / count.sum()).item()


def calibration_bins(probabilities: Tensor, targets: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the number of samples in each bin, the sum of their confidences, and how many are predicted right.

    Arguments and errors are those of `calibration_error`.

    Returns:
        Three tensors of shape `(bins,)` in float64.
    """
    probabilities, targets = _classes(probabilities, targets)
    require_bins(bins)
    confidence, predicted = probabilities.double().max(1)
    place = (confidence * bins).long().clamp(0, bins - 1)
    sums = torch.zeros(3, bins, dtype=torch.float64, device=confidence.device)
    sums.index_add_(1, place, torch.stack([torch.ones_like(confidence), confidence, (predicted == targets).double()]))
    count, confident, right = sums
    return count, confident, right


def require_bins(bins: object) -> None:
    """Raise unless `bins` is a whole number above 0.

    Raises:
        OptionError: it is not.
    """
    if not isinstance(bins, int) or isinstance(bins, bool) or bins < 1:
        raise OptionError(f"bins={bins!r} must be a whole number >= 1.")


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Probability that a sample from outside is more uncertain than one from inside, ties counted by half.

    That is the area under the receiver operating characteristic (Hanley and McNeil, 1982).

    Args:
        inside: an uncertainty of samples like the training data, shape `(N,)`, such as `prediction.entropy`.
        outside: the same of samples that are not, shape `(M,)`.

    Raises:
        BatchError: one is no vector, has no sample, or an entry that is not a number.
    """
    ordered, outside = _scores(inside, outside)
    below = torch.searchsorted(ordered, outside, right=False).double()
    not_above = torch.searchsorted(ordered, outside, right=True).double()
    return ((below + not_above) / 2).mean().item() / len(ordered)


def fpr95(inside: Tensor, outside: Tensor) -> float:
    """Share of the samples from outside that pass where at least 95 % of those from inside pass.

    A sample passes if its uncertainty is at most a threshold, the lowest with which 95 % do.

    Args:
        inside: as for `auroc`.
        outside: as for `auroc`.

    Raises:
        BatchError: as for `auroc`.
    """
    ordered, outside = _scores(inside, outside)
    threshold = ordered[-(-95 * len(ordered) // 100) - 1]
    return (outside <= threshold).double().mean().item()


def _classes(probabilities: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as tensors on one device.

    Raises:
        BatchError: they are no probabilities of classes and class indices, one for each sample.
    """
    probabilities = torch.as_tensor(probabilities)
    targets = torch.as_tensor(targets, device=probabilities.device)
    shapes = f"{tuple(probabilities.shape)} and {tuple(targets.shape)}"
    if probabilities.dim() != 2 or targets.shape != probabilities.shape[:1] or not len(targets):
        raise BatchError(
            "Metrics need probabilities of shape (N, C) and class indices of shape (N,), N >= 1, but got "
            f"{shapes}: of class 1 alone, pass torch.stack([1 - p, p], 1); of several positions, flatten them."
        )
    sums = probabilities.sum(1, dtype=torch.float64)
    wrong = (probabilities < 0).any(1) | ((sums - 1).abs() > _OFF)  # what is not a number makes the metric none
    if not probabilities.is_floating_point() or bool(wrong.any()):
        raise BatchError(
            "Metrics need probabilities of the classes, not negative, with sum 1 for each sample: pass "
            "logits.softmax(1), or the probabilities of a prediction."
        )
    if targets.is_floating_point() or not bool(((targets >= 0) & (targets < probabilities.shape[1])).all()):
        raise BatchError(
            f"Targets must be whole numbers from 0 to {probabilities.shape[1] - 1}, the indices of the classes, but "
            f"they are of dtype {targets.dtype}, from {targets.min().item()} to {targets.max().item()}: leave out the "
            "samples that do not count."
        )
    return probabilities, targets.long()


_OFF = 0.02  # by how much the sum of probabilities in half precision may differ from 1


def _scores(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    inside, outside = torch.as_tensor(inside), torch.as_tensor(outside)
    for name, scores in (("inside", inside), ("outside", outside)):
        if scores.dim() != 1 or not len(scores) or bool(scores.isnan().any()):
            raise BatchError(f"{name} must be a vector of numbers with at least one entry, got {tuple(scores.shape)}.")
    return inside.double().sort().values, outside.double()
