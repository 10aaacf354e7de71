"""Opacus' norm samplers (ghost norms): the norms of gradients from inputs and gradients at outputs, and where they err.

`GradSampleModuleFastGradientClipping` runs them; here they are called for single layers, as its grad samplers are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from persample.kernels.linear import norms_from_products
from persample.sources.backends.external.layer_gradients import LayerCall, trainable
from persample.sources.backends.external.opacus_layers import NORM_SAMPLERS


def reason_against_norms(use: LayerCall) -> str:
    """Return why there is no norm sampler that is right for the one trainable parameter of a call; empty if so."""
    layer = use.layer
    if type(layer) not in NORM_SAMPLERS:
        return f"is that of a {type(layer).__name__}, for which Opacus has no norm sampler."
    if not isinstance(layer, nn.Linear) or use.delta.dim() == 2:
        return ""
    if use.delta.dim() > 3:
        return f"is used on inputs of {use.delta.dim()} dimensions, of which Opacus' norm sampler knows only 2 and 3."
    (parameter,) = trainable(layer)
    if parameter is layer.bias:
        return "is a bias on positions, whose norm Opacus takes from products that lose digits where they cancel."
    if not norms_from_products(use.delta.shape[1], layer.out_features, layer.in_features):
        return "is used on so many positions that their products take more than the gradients themselves."
    return ""


def squared_norms(use: LayerCall) -> Mapping[nn.Parameter, Tensor]:
    """Return ‖g_i‖², `(B,)`, by the norm sampler of the layer."""
    norms: Mapping[nn.Parameter, Tensor] = NORM_SAMPLERS[type(use.layer)](use.layer, list(use.inputs), use.delta)
    return {p: n.square() for p, n in norms.items()}


def as_one_sample(use: LayerCall, weights: Tensor) -> LayerCall | None:
    """Return a call with one sample, whose gradient is Σ_i w_i g_i; None for layers that tell positions apart.

    A linear layer and a table add up all positions of a sample, so those of all samples may be positions of one.
    """
    layer = use.layer
    if type(layer) not in (nn.Linear, nn.Embedding):
        return None
    delta = use.delta * weights.to(use.delta.dtype).view(-1, *[1] * (use.delta.dim() - 1))
    a = use.inputs[0]
    a = a.flatten(0, -2) if isinstance(layer, nn.Linear) else a.flatten()
    return replace(use, inputs=(a.unsqueeze(0),), delta=delta.flatten(0, -2).unsqueeze(0))
