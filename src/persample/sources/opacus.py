"""Backend `"opacus"`: the grad samplers of Opacus's GradSampleModule."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from persample.errors import UnsupportedModelError
from persample.sources.peer_rules import LayerUse, PeerRulesSource, alteration


@contextmanager
def _logging_untouched() -> Iterator[None]:
    """Take off the handler that Opacus puts on the root logger when it is imported: whether to log is the user's."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


with _logging_untouched():
    from opacus.grad_sample import GradSampleModule
    from opacus.grad_sample.functorch import ft_compute_per_sample_gradient

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
#: Layers of PyTorch for which Opacus has a rule.
_WITH_RULE = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, *_INSTANCE_NORMS, *_CONVOLUTIONS)
#: Layers of PyTorch that Opacus hands to torch.func, which runs them for each sample again.
_BY_FUNCTORCH = (nn.PReLU, *_TRANSPOSED)


class OpacusSource(PeerRulesSource):
    """Per-sample gradients by the rules of Opacus (Yousefpour et al., 2021, arXiv:2109.12298).

    These are the grad samplers that `GradSampleModule` looks up by the exact class of a layer, and its use of
    `torch.func` for transposed convolutions and PReLU. They are called for each layer once its input and the gradient
    at its output are known, with the sum of the losses; the model is not wrapped. So it may be in eval mode, and its
    parameters keep their names.

    Opacus serves linear layers, convolutions and their transposes, embeddings, LayerNorm, GroupNorm, RMSNorm,
    InstanceNorm, PReLU, and the classes for which users have called `opacus.grad_sample.register_grad_sampler`.
    """

    package = "Opacus"

    def rows(self, use: LayerUse) -> Mapping[nn.Parameter, Tensor]:
        inputs = list(use.inputs)
        if isinstance(use.layer, nn.Conv2d):
            # The rule reads the input by its strides as if they were those of a contiguous tensor.
            inputs[0] = inputs[0].clone(memory_format=torch.contiguous_format)
        if isinstance(use.layer, _TRANSPOSED):
            _refuse_chosen_output_size(use, use.layer)
        rule = GradSampleModule.GRAD_SAMPLERS.get(type(use.layer))
        rows: Mapping[nn.Parameter, Tensor]
        if rule is None:
            rows = ft_compute_per_sample_gradient(_without_hooks(use.layer), inputs, use.delta)
        else:
            with _cudnn_flag_restored():
                rows = rule(use.layer, inputs, use.delta)
        return rows

    def reason_against(self, layer: nn.Module) -> str | None:
        kind = type(layer)
        if kind not in _WITH_RULE + _BY_FUNCTORCH:
            return _reason_against_unknown(layer)
        if isinstance(layer, _CONVOLUTIONS) and layer.padding_mode != "zeros":
            return f"has padding_mode={layer.padding_mode!r}, but Opacus takes zeros: pad before the layer."
        if isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
            return f"has padding_idx={layer.padding_idx}, which Opacus overlooks."
        if isinstance(layer, nn.LayerNorm) and layer._parameters["bias"] is None:
            return "has bias=False, on which Opacus fails."
        if isinstance(layer, _INSTANCE_NORMS) and layer.track_running_stats:
            return "has track_running_stats=True, which Opacus does not support: set track_running_stats=False."
        return alteration(layer)


def _reason_against_unknown(layer: nn.Module) -> str | None:
    if isinstance(layer, nn.EmbeddingBag):
        return "overwrites repeated indices in Opacus, and weights and maxima are overlooked."
    if type(layer) in GradSampleModule.GRAD_SAMPLERS:
        return None
    if isinstance(layer, _WITH_RULE + _BY_FUNCTORCH):
        return "is a subclass of a layer that Opacus knows, and may compute something else than that."
    return "has parameters, and Opacus has no rule for it (opacus.grad_sample.register_grad_sampler adds one)."


def _refuse_chosen_output_size(use: LayerUse, layer: _ConvTransposeNd) -> None:
    """Raise if the call asked for another size than the layer's own, because Opacus runs it without `output_size`."""
    for d, positions in enumerate(use.inputs[0].shape[2:]):
        window = layer.dilation[d] * (layer.kernel_size[d] - 1) + 1
        size = (positions - 1) * layer.stride[d] - 2 * int(layer.padding[d]) + window + layer.output_padding[d]
        if use.delta.shape[2 + d] != size:
            raise UnsupportedModelError(
                f"{use.name} was called with an output_size of its own, which Opacus does not pass on: set "
                "output_padding in the layer, or use backend 'fused' or 'loop'."
            )


def _without_hooks(layer: nn.Module) -> nn.Module:
    """A copy with the same parameters: Opacus runs the layer once more, which the hooks of the user must not see."""
    bare = copy.copy(layer)
    vars(bare).update({name: OrderedDict() for name in vars(bare) if name.endswith("_hooks")})
    return bare


@contextmanager
def _cudnn_flag_restored() -> Iterator[None]:
    """Opacus switches torch.backends.cudnn.deterministic on and off for embeddings."""
    before = torch.backends.cudnn.deterministic
    try:
        yield
    finally:
        if torch.backends.cudnn.deterministic != before:  # frozen flags cannot even be set to what they are
            torch.backends.cudnn.deterministic = before
