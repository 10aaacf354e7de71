"""Normalisations: y = γ ∘ x̂ + β, so the terms of g_i are δ ∘ x̂ for the scale γ and δ for the shift β.

x̂ is computed once more from the input, by the same functions without scale and shift. A BatchNorm gets here only in
eval mode, where its statistics are constants and the samples do not meet.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from persample.sources.backends.contributions import Contribution, Terms


def layer_norm(module: nn.LayerNorm, x: Tensor, delta: Tensor) -> dict[str, Contribution]:
    """Return the contributions of one call; `x` and `delta` are `(B, …, *normalized_shape)`."""
    normalized = F.layer_norm(x, module.normalized_shape, eps=module.eps)
    return _trailing(module.normalized_shape, normalized, delta)


def rms_norm(module: nn.RMSNorm, x: Tensor, delta: Tensor) -> dict[str, Contribution]:
    """Return the contributions of one call; `x` and `delta` are `(B, …, *normalized_shape)`."""
    shape = tuple(module.normalized_shape)
    return _trailing(shape, F.rms_norm(x, shape, eps=module.eps), delta)


def group_norm(module: nn.GroupNorm, x: Tensor, delta: Tensor) -> dict[str, Contribution]:
    """Return the contributions of one call; `x` and `delta` are `(B, C, …)`."""
    return _channels(F.group_norm(x, module.num_groups, eps=module.eps), delta)


def batch_or_instance_norm(module: _NormBase, x: Tensor, delta: Tensor) -> dict[str, Contribution]:
    """Return the contributions of one call; `x` and `delta` are `(B, C, …)`."""
    if module.training or module.running_mean is None:
        return _channels(F.instance_norm(x, eps=module.eps), delta)
    mean, variance = module.running_mean, module.running_var
    return _channels(F.batch_norm(x, mean, variance, training=False, eps=module.eps), delta)


def _trailing(shape: tuple[int, ...], normalized: Tensor, delta: Tensor) -> dict[str, Contribution]:
    """Scale and shift have the trailing `shape`; the dimensions between it and the sample are positions."""
    by_position = (len(delta), -1, *shape)
    return {
        "weight": Terms((delta * normalized).reshape(by_position)),
        "bias": Terms(delta.reshape(by_position)),
    }


def _channels(normalized: Tensor, delta: Tensor) -> dict[str, Contribution]:
    """Scale and shift have one entry for each channel; the dimensions after it are positions."""
    by_channel = (*delta.shape[:2], -1)
    return {
        "weight": Terms((delta * normalized).reshape(by_channel).mT),
        "bias": Terms(delta.reshape(by_channel).mT),
    }
