"""The layers that BackPACK supports, and where its results are wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from persample.frozen_batch_norm import FrozenBatchNorm
from persample.sources.backends.external.layer_rules import alteration

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_KINDS = (
    nn.Linear,
    nn.Embedding,
    *CONVOLUTIONS,
    *TRANSPOSED,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    FrozenBatchNorm,
)
#: What BackPACK knows a FrozenBatchNorm as, by the dimensions of its input.
BATCH_NORMS: dict[int, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def reason_against(layer: nn.Module) -> str | None:
    """Return why BackPACK has no exact rule for `layer`, as a sentence without its subject; None if it has one."""
    if type(layer) not in _KINDS:
        if isinstance(layer, _KINDS):
            return "is a subclass of a layer that BackPACK supports, and may compute something different."
        return "has parameters, and BackPACK has no rule that is exact for it in every use."
    if isinstance(layer, CONVOLUTIONS):
        if layer.padding == "same":
            return "has padding='same', which BackPACK computes incorrectly: pass numbers."
        if layer.padding_mode != "zeros":
            return f"has padding_mode={layer.padding_mode!r}, but BackPACK pads with zeros: pad before the layer."
    if isinstance(layer, TRANSPOSED) and any(layer.output_padding):
        return f"has output_padding={layer.output_padding}, which BackPACK ignores."
    if isinstance(layer, nn.Embedding):
        return _reason_against_embedding(layer) or alteration(layer)
    return alteration(layer)


def _reason_against_embedding(layer: nn.Embedding) -> str | None:
    if layer.padding_idx is not None:
        return f"has padding_idx={layer.padding_idx}, which BackPACK ignores."
    if layer.sparse:
        return "has sparse=True, which BackPACK does not support: set sparse=False."
    precise = torch.promote_types(layer.weight.dtype, torch.float32)
    if precise != torch.get_default_dtype():
        return (
            f"has a weight of {layer.weight.dtype}, but BackPACK computes embeddings in the default dtype, "
            f"{torch.get_default_dtype()}: cast the weight, or call torch.set_default_dtype."
        )
    return None
