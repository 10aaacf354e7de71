"""The distribution of the targets that a loss stands for, and the outputs that it applies to."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from persample import losses
from persample.errors import UsageError
from persample.likelihoods import Bernoulli, Categorical, Gaussian, TargetDistribution

_SETTINGS = {"weight": None, "label_smoothing": 0.0, "pos_weight": None}


def distribution_of(loss_fn: Callable[..., Any]) -> TargetDistribution:
    """Return the likelihood that a loss of this package or of PyTorch stands for.

    Raises:
        UsageError: the loss stands for no known likelihood, or is weighted.
    """
    if isinstance(loss_fn, TargetDistribution):
        return loss_fn
    keywords: dict[str, Any] = {}
    while isinstance(loss_fn, functools.partial):
        keywords = {**loss_fn.keywords, **keywords}
        loss_fn = loss_fn.func
    weighted = [n for n, plain in _SETTINGS.items() if keywords.get(n, getattr(loss_fn, n, plain)) not in (plain, None)]
    if not weighted:
        if loss_fn in (losses.cross_entropy, F.cross_entropy) or isinstance(loss_fn, nn.CrossEntropyLoss):
            return Categorical(ignore_index=keywords.get("ignore_index", getattr(loss_fn, "ignore_index", -100)))
        if loss_fn in (losses.bernoulli, F.binary_cross_entropy_with_logits) or isinstance(
            loss_fn, nn.BCEWithLogitsLoss
        ):
            return Bernoulli()
        if loss_fn is losses.gaussian:
            return Gaussian(float(keywords.get("noise_precision", 1.0)))
    if loss_fn is F.mse_loss or isinstance(loss_fn, nn.MSELoss):
        reason = "a squared error does not tell the noise: use persample.likelihoods.Gaussian(noise_precision)"
    else:
        reason = f"it has {weighted[0]}" if weighted else "it is none of those"
    raise UsageError(
        'kind="mc" and kind="exact" need a loss that is a distribution of the targets: one of persample.likelihoods, '
        "persample.losses.cross_entropy, bernoulli or gaussian, or cross entropy of PyTorch without weights "
        f'({reason}). kind="empirical" takes every loss.'
    )


def logits_of(outputs: Any) -> Tensor:
    """Return the tensor of outputs, or their `logits`.

    Raises:
        UsageError: there is none.
    """
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", outputs)
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise UsageError(
            f'The model returned {type(outputs).__name__}, of which kind="mc" and kind="exact" need one tensor of '
            "floating-point numbers: let it return that, or an object with .logits."
        )
    return found
