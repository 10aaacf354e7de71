"""Class probabilities of a model with the weights that it has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from persample.errors import BatchError, UsageError


def class_probabilities(model: nn.Module, inputs: Any) -> Tensor:
    """Softmax over dim 1 of the model's outputs, in at least float32, shape `(B, C, …)`.

    Args:
        model: the network.
        inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments of the model.

    Raises:
        BatchError: `inputs` is something else.
        UsageError: the output is not a tensor of logits of shape `(B, C, …)`.
    """
    if isinstance(inputs, Tensor):
        logits = model(inputs)
    elif isinstance(inputs, tuple):
        logits = model(*inputs)
    elif isinstance(inputs, Mapping):
        logits = model(**inputs)
    else:
        raise BatchError(
            f"inputs is of type {type(inputs).__name__}: pass a tensor, a tuple of positional arguments or a dict of "
            "keyword arguments of the model."
        )
    if not isinstance(logits, Tensor) or logits.dim() < 2 or not logits.is_floating_point():
        what = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(
            "Class probabilities need logits of shape (B, C, …), but the model returned "
            f"{what}: average what you need over several `with optimizer.sampled_params():` blocks."
        )
    return logits.softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))
