"""Backend `"opacus"`: Opacus's `GradSampleModule`, and its grad samplers for single layers."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from persample.sources.backends.external.layer_gradients import LayerCall
from persample.sources.backends.external.layer_rules import PeerRulesSource
from persample.sources.backends.external.opacus_layers import (
    EMBEDDING_BAG,
    KNOWN,
    TRANSPOSED,
    GradSampleModule,
    cudnn_flag_restored,
    ft_compute_per_sample_gradient,
    reason_against,
    refuse_chosen_output_size,
)
from persample.sources.backends.external.opacus_module import OpacusModule
from persample.sources.backends.external.opacus_norms import as_one_sample, reason_against_norms, squared_norms
from persample.sources.backends.external.source import PeerSource


class OpacusRules(PeerRulesSource):
    """Per-sample gradients by Opacus's grad samplers, applied layer by layer.

    These are the rules that `GradSampleModule` looks up by the exact class of a layer, and its use of `torch.func` for
    transposed convolutions and PReLU. They are called for each layer once its input and the gradient at its output are
    known, with the sum of the losses; the model is not wrapped.
    """

    package, by_gradients, by_norms = "Opacus", "grad sampler", "norm sampler"
    norms_form_gradients = False

    def rows(self, use: LayerCall) -> Mapping[nn.Parameter, Tensor]:
        inputs = list(use.inputs)
        if isinstance(use.layer, nn.Conv2d):
            # The rule reads the input by its strides as if they were those of a contiguous tensor.
            inputs[0] = inputs[0].clone(memory_format=torch.contiguous_format)
        if isinstance(use.layer, TRANSPOSED):
            refuse_chosen_output_size(use.name, use.layer, use.inputs[0], use.delta)
        rule = GradSampleModule.GRAD_SAMPLERS.get(type(use.layer))
        rows: Mapping[nn.Parameter, Tensor]
        if rule is None:
            rows = ft_compute_per_sample_gradient(_without_hooks(use.layer), inputs, use.delta)
        else:
            with cudnn_flag_restored():
                rows = rule(use.layer, inputs, use.delta)
        return rows

    def reason_against(self, layer: nn.Module) -> str | None:
        kind = type(layer)
        if kind in KNOWN:
            return reason_against(layer)
        if isinstance(layer, nn.EmbeddingBag):
            return EMBEDDING_BAG
        if kind in GradSampleModule.GRAD_SAMPLERS:
            return None
        if isinstance(layer, KNOWN):
            return "is a subclass of a layer that Opacus supports, and may compute something different."
        return "has parameters, and Opacus has no rule for it (opacus.grad_sample.register_grad_sampler adds one)."

    def reason_against_norms(self, use: LayerCall) -> str:
        return reason_against_norms(use)

    def squared_norms(self, use: LayerCall) -> Mapping[nn.Parameter, Tensor]:
        return squared_norms(use)

    def own_weighted_sum(self, use: LayerCall, weights: Tensor) -> Tensor | None:
        together = as_one_sample(use, weights)
        return None if together is None else self.gradients(together).squeeze(0)


class OpacusSource(PeerSource):
    """Per-sample gradients by Opacus (Yousefpour et al., 2021, arXiv:2109.12298).

    Args:
        model: the network.
        loss_fn: the loss of each sample.
        check: when the self-check runs.
        machinery: `"module"` is `opacus.GradSampleModule`, around modules that share the parameters of the model, so
            that no trace is left. `"rules"` are the grad samplers of Opacus for single layers, called from hooks of
            this package. `"auto"` is the first, unless something is found in the model, or in its forward pass, that
            it is known to get wrong, and then the second.

    Raises:
        OptionError: `machinery` is not known.
    """

    own = "module"
    by_machinery = OpacusModule
    by_rules = OpacusRules


def _without_hooks(layer: nn.Module) -> nn.Module:
    """A copy with the same parameters: Opacus runs the layer once more, without the user's hooks."""
    bare = copy.copy(layer)
    vars(bare).update({name: OrderedDict() for name in vars(bare) if name.endswith("_hooks")})
    return bare
