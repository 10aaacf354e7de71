"""The layers that Opacus supports, and where its results are wrong."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from persample.errors import UnsupportedModelError
from persample.sources.backends.external.layer_rules import alteration
from persample.sources.model.refusals import FUSED_OR_VJP


@contextmanager
def _logging_untouched() -> Iterator[None]:
    """Remove the handler that importing Opacus adds to the root logger: logging is the user's choice."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


with _logging_untouched():
    from opacus.grad_sample import GradSampleModule as GradSampleModule
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.grad_sample.functorch import ft_compute_per_sample_gradient as ft_compute_per_sample_gradient
    from opacus.layers import DPGRU, DPLSTM, DPRNN, SequenceBias
    from opacus.layers.dp_rnn import RNNLinear

#: Opacus' norms of single samples, by the exact class of a layer.
NORM_SAMPLERS = GradSampleModuleFastGradientClipping.NORM_SAMPLERS
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
#: Layers of PyTorch for which Opacus has a rule.
WITH_RULE = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, *INSTANCE_NORMS, *CONVOLUTIONS)
#: Layers of PyTorch that Opacus hands to torch.func, which runs them for each sample again.
BY_FUNCTORCH = (nn.PReLU, *TRANSPOSED)
#: The layers of which is known what Opacus makes of them.
KNOWN = WITH_RULE + BY_FUNCTORCH
#: Layers of Opacus whose parameters are those of the layers inside of them.
MADE_OF_LAYERS = (DPRNN, DPLSTM, DPGRU)
#: Layers that compute the same in training mode and in eval mode.
WITHOUT_MODE = (*KNOWN, RNNLinear, SequenceBias)

EMBEDDING_BAG = "gets wrong gradients in Opacus for repeated indices, per_sample_weights and mode='max'."


def reason_against(layer: nn.Module) -> str | None:
    """Return why Opacus is wrong on `layer`, of one of the `KNOWN` classes, as a sentence without its subject."""
    if isinstance(layer, CONVOLUTIONS) and layer.padding_mode != "zeros":
        return f"has padding_mode={layer.padding_mode!r}, but Opacus pads with zeros: pad before the layer."
    if isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
        return f"has padding_idx={layer.padding_idx}, which Opacus ignores."
    if isinstance(layer, nn.LayerNorm) and layer._parameters["bias"] is None:
        return "has bias=False, on which Opacus fails."
    if isinstance(layer, INSTANCE_NORMS) and layer.track_running_stats:
        return "has track_running_stats=True, which Opacus does not support: set track_running_stats=False."
    return alteration(layer)


def refuse_chosen_output_size(name: str, layer: _ConvTransposeNd, inputs: Tensor, output: Tensor) -> None:
    """Raise if a call passed an `output_size` that matters: Opacus runs the layer without it.

    Raises:
        UnsupportedModelError: it did.
    """
    for d, positions in enumerate(inputs.shape[2:]):
        window = layer.dilation[d] * (layer.kernel_size[d] - 1) + 1
        size = (positions - 1) * layer.stride[d] - 2 * int(layer.padding[d]) + window + layer.output_padding[d]
        if output.shape[2 + d] != size:
            raise UnsupportedModelError(
                f"{name} was called with output_size, which Opacus does not pass on: set output_padding in the layer, "
                f"or {FUSED_OR_VJP}."
            )


@contextmanager
def cudnn_flag_restored() -> Iterator[None]:
    """Opacus switches torch.backends.cudnn.deterministic on and off for embeddings."""
    before = torch.backends.cudnn.deterministic
    try:
        yield
    finally:
        if torch.backends.cudnn.deterministic != before:  # frozen flags cannot even be set to what they are
            torch.backends.cudnn.deterministic = before
