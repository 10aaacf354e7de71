"""Averaging outputs over draws of the weights, and the loss of the average, for trainers that compute it inside.

Which likelihood a model has is not told by its outputs, so it is found: the one whose mean loss is the loss that the
model returned for a draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from persample.errors import OptionError
from persample.sources.selfcheck.tolerances import tolerance

Outputs: TypeAlias = Literal["categorical", "bernoulli", "gaussian"]


def require_outputs(likelihood: object) -> None:
    """Raise unless `likelihood` is one of `Outputs`, or None.

    Raises:
        OptionError: it is something else.
    """
    if likelihood is not None and likelihood not in get_args(Outputs):
        raise OptionError(
            f"likelihood={likelihood!r} must be one of {', '.join(map(repr, get_args(Outputs)))}, or None."
        )


def averaged(likelihood: Outputs, outputs: Tensor) -> Tensor:
    """Return outputs whose prediction is the average of those of K draws, `(K, B, …)`.

    Of logits, whose classes are in the last dimension, these are the logarithms of the averaged probabilities; of
    logits of single classes the logit of the averaged probability; of real numbers the mean.
    """
    if likelihood == "gaussian":
        return outputs.mean(0)
    count = math.log(len(outputs))
    if likelihood == "categorical":
        return outputs.log_softmax(-1).logsumexp(0) - count
    return F.logsigmoid(outputs).logsumexp(0) - F.logsigmoid(-outputs).logsumexp(0)


def loss_like(
    outputs: Tensor, labels: Tensor, loss: Tensor, *, smoothing: float = 0.0
) -> tuple[Outputs, Callable[[Tensor], Tensor]] | None:
    """Return the likelihood whose mean loss of `outputs` is `loss`, and that loss as a function; None if there is none.

    Args:
        outputs: of a model, shape `(B, …)`.
        labels: what the model computed its loss from; −100 is ignored.
        loss: the loss that it returned.
        smoothing: of the labels, where it is a cross-entropy.
    """
    for name, (likelihood, function) in _LOSSES.items():
        if not _takes(name, outputs, labels):
            continue
        if likelihood == "categorical":
            function = partial(function, smoothing=smoothing)
        found = function(outputs, labels)
        if torch.allclose(found, loss.to(found), rtol=tolerance(outputs), atol=tolerance(outputs), equal_nan=True):
            return likelihood, lambda other, function=function: function(other, labels)
    return None


def _cross_entropy(outputs: Tensor, labels: Tensor, *, smoothing: float) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), labels.flatten(), label_smoothing=smoothing)


def _of_next(outputs: Tensor, labels: Tensor, *, smoothing: float) -> Tensor:
    return _cross_entropy(outputs[:, :-1], labels[:, 1:], smoothing=smoothing)


def _bernoulli(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, labels.to(outputs))


def _squares(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(outputs.flatten(), labels.to(outputs).flatten())


_LOSSES: Mapping[str, tuple[Outputs, Callable[..., Tensor]]] = {
    "cross-entropy": ("categorical", _cross_entropy),
    "cross-entropy of the next": ("categorical", _of_next),
    "binary cross-entropy": ("bernoulli", _bernoulli),
    "squared error": ("gaussian", _squares),
}


def _takes(name: str, outputs: Tensor, labels: Tensor) -> bool:
    if name.startswith("cross-entropy"):
        fits = labels.shape == outputs.shape[:-1] and not labels.is_floating_point()
        return fits and (outputs.dim() > 2 or not name.endswith("next"))
    return labels.numel() == outputs.numel() if name == "squared error" else labels.shape == outputs.shape
