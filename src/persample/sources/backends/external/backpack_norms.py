"""BackPACK's `BatchL2Grad` and its sums over samples: what they give for single layers, and where they err."""

from __future__ import annotations

import copy
from dataclasses import replace

from backpack.extensions import BatchGrad, BatchL2Grad, SumGradSquared
from backpack.extensions.firstorder.base import FirstOrderBackpropExtension
from backpack.extensions.firstorder.gradient.batchnorm_nd import GradBatchNormNd
from backpack.extensions.firstorder.gradient.conv1d import GradConv1d
from backpack.extensions.firstorder.gradient.conv2d import GradConv2d
from backpack.extensions.firstorder.gradient.conv3d import GradConv3d
from backpack.extensions.firstorder.gradient.convtranspose1d import GradConvTranspose1d
from backpack.extensions.firstorder.gradient.convtranspose2d import GradConvTranspose2d
from backpack.extensions.firstorder.gradient.convtranspose3d import GradConvTranspose3d
from backpack.extensions.firstorder.gradient.embedding import GradEmbedding
from backpack.extensions.firstorder.gradient.linear import GradLinear
from torch import Tensor, nn

from persample.frozen_batch_norm import FrozenBatchNorm
from persample.sources.backends.external.backpack_layers import BATCH_NORMS, CONVOLUTIONS, TRANSPOSED
from persample.sources.backends.external.layer_gradients import LayerCall, trainable

# None holds anything of a call, and to make one takes as long as to use it on a small layer.
BATCH_GRAD = BatchGrad()
BATCH_L2_GRAD = BatchL2Grad()
SUM_GRAD_SQUARED = SumGradSquared()
#: What BackPACK's `Variance` is made of beside `SumGradSquared`.
GRADIENT = FirstOrderBackpropExtension(
    "grad_sum",
    {
        nn.Linear: GradLinear(),
        nn.Embedding: GradEmbedding(),
        **dict(zip(CONVOLUTIONS, (GradConv1d(), GradConv2d(), GradConv3d()), strict=True)),
        **dict(zip(TRANSPOSED, (GradConvTranspose1d(), GradConvTranspose2d(), GradConvTranspose3d()), strict=True)),
        **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), GradBatchNormNd()),
    },
)


def extended(extension: FirstOrderBackpropExtension, use: LayerCall) -> dict[nn.Parameter, Tensor]:
    """Apply `extension` to one use, as BackPACK's backward hook would."""
    # A copy that shares the parameters, so that the attributes which BackPACK reads are not put on the user's module.
    layer = copy.copy(use.layer)
    if isinstance(layer, FrozenBatchNorm):
        layer.__class__ = BATCH_NORMS[use.delta.dim()]
    layer.input0, layer.output = use.inputs[0], use.delta
    field = extension.savefield
    held = [(p, vars(p)[field]) for p in trainable(layer) if field in vars(p)]  # the user's own
    extension(layer, (None,), (use.delta,))
    found = {p: vars(p).pop(field) for p in trainable(layer)}
    for p, value in held:
        vars(p)[field] = value
    return found


def reason_against_norms(use: LayerCall) -> str:
    """Return why `BatchL2Grad` is not right for the one trainable parameter of a call; empty if it is."""
    layer = use.layer
    (parameter,) = trainable(layer)
    if not isinstance(layer, CONVOLUTIONS + TRANSPOSED) or parameter is layer.bias:
        return ""
    if layer.groups > 1:
        return f"is that of a convolution in {layer.groups} groups, whose products BatchL2Grad mixes."
    if isinstance(layer, nn.Conv2d) and isinstance(layer.padding, str):
        return f"is that of a convolution with padding={layer.padding!r}, on which BatchL2Grad fails."
    return ""


def weighted_sum(use: LayerCall, weights: Tensor) -> dict[nn.Parameter, Tensor]:
    """Return Σ_i w_i g_i without forming g_i, by the products of which BackPACK makes `Variance`."""
    weighted = use.delta * weights.to(use.delta.dtype).view(-1, *[1] * (use.delta.dim() - 1))
    return extended(GRADIENT, replace(use, delta=weighted))
