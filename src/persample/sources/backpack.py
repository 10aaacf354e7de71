"""Backend `"backpack"`: BackPACK's BatchGrad and SumGradSquared."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from backpack.extensions import BatchGrad, SumGradSquared
from torch import Tensor, nn

from persample.frozen_batch_norm import FrozenBatchNorm
from persample.moments import Moments
from persample.sources.batch import Batch
from persample.sources.peer_rules import LayerUse, PeerRulesSource, alteration, trainable

# Neither holds anything of a call, and to make one takes as long as to use it on a small layer.
_BATCH_GRAD = BatchGrad()
_SUM_GRAD_SQUARED = SumGradSquared()

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_KINDS = (
    nn.Linear,
    nn.Embedding,
    *_CONVOLUTIONS,
    *_TRANSPOSED,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    FrozenBatchNorm,
)
#: What BackPACK knows a FrozenBatchNorm as, by the dimensions of its input.
_BATCH_NORMS: dict[int, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


class BackpackSource(PeerRulesSource):
    """Per-sample gradients by the extensions of BackPACK (Dangel, Kunstner and Hennig, 2020, arXiv:1912.10985).

    `per_sample` is `BatchGrad`, `moments` is `SumGradSquared` beside the ordinary gradient of the same backward pass,
    both with the sum of the losses, so that nothing has to be scaled. The extensions are called for each layer once
    its input and the gradient at its output are known; BackPACK's context and hooks are not used.

    BackPACK serves linear layers, convolutions and their transposes, embeddings, and BatchNorm in eval mode, each as
    the exact class. A parameter that is used more than once is served by `BatchGrad` in `moments` too: all uses are
    added up for each sample before they are squared.
    """

    package = "BackPACK"

    def compute_moments(self, batch: Batch) -> Moments:
        parameters = self.parameters()
        losses, total, uses = self.backward(batch, parameters.values())
        squares = self.square_sums(uses)
        return Moments(
            losses=losses,
            mean={
                name: _zeros(p) if g is None else g / batch.size
                for (name, p), g in zip(parameters.items(), total, strict=True)
            },
            second_moment={
                name: (squares[p] / batch.size).to(p.dtype) if p in squares else _zeros(p)
                for name, p in parameters.items()
            },
        )

    def square_sums(self, uses: Iterable[LayerUse]) -> dict[nn.Parameter, Tensor]:
        uses = list(uses)
        times = Counter(p for use in uses for p in trainable(use.layer))
        squares: dict[nn.Parameter, Tensor] = {}
        others = []
        for use in uses:
            if _is_summable(use, times):
                squares |= self.by_rule(_square_sums, use)
            else:
                others.append(use)
        return squares | super().square_sums(others)

    def rows(self, use: LayerUse) -> dict[nn.Parameter, Tensor]:
        return _extended(_BATCH_GRAD, use)

    def reason_against(self, layer: nn.Module) -> str | None:
        if type(layer) not in _KINDS:
            if isinstance(layer, _KINDS):
                return "is a subclass of a layer that BackPACK knows, and may compute something else than that."
            return "has parameters, and BackPACK has no rule for it, or none that holds in all its uses."
        if isinstance(layer, _CONVOLUTIONS):
            if layer.padding == "same":
                return "has padding='same', which BackPACK takes wrongly: give it in numbers."
            if layer.padding_mode != "zeros":
                return f"has padding_mode={layer.padding_mode!r}, but BackPACK takes zeros: pad before the layer."
        if isinstance(layer, _TRANSPOSED) and any(layer.output_padding):
            return f"has output_padding={layer.output_padding}, which BackPACK does not know."
        if isinstance(layer, nn.Embedding):
            return _reason_against_embedding(layer) or alteration(layer)
        return alteration(layer)


def _reason_against_embedding(layer: nn.Embedding) -> str | None:
    if layer.padding_idx is not None:
        return f"has padding_idx={layer.padding_idx}, which BackPACK does not know."
    if layer.sparse:
        return "has sparse=True, which BackPACK does not know: set sparse=False."
    precise = torch.promote_types(layer.weight.dtype, torch.float32)
    if precise != torch.get_default_dtype():
        return (
            f"has a weight of {layer.weight.dtype}, but BackPACK computes embeddings in the default dtype only, which "
            f"is {torch.get_default_dtype()}: change one of the two (torch.set_default_dtype)."
        )
    return None


def _is_summable(use: LayerUse, times: Counter[nn.Parameter]) -> bool:
    """Whether SumGradSquared serves this use.

    It does not if a parameter is used elsewhere too, because all uses must be added up before they are squared. On a
    sequence of L positions its contraction for linear layers needs B·L·I·O numbers where opt_einsum is missing.
    """
    on_sequence = isinstance(use.layer, nn.Linear) and use.delta.dim() > 2
    return not on_sequence and all(times[p] == 1 for p in trainable(use.layer))


def _square_sums(use: LayerUse) -> dict[nn.Parameter, Tensor]:
    """Σ_i g_i² for the parameters of one layer."""
    return _extended(_SUM_GRAD_SQUARED, use)


def _extended(extension: BatchGrad | SumGradSquared, use: LayerUse) -> dict[nn.Parameter, Tensor]:
    """Apply `extension` to one use, as BackPACK's backward hook would."""
    # A copy that shares the parameters, so that the attributes which BackPACK reads are not put on the user's module.
    layer = copy.copy(use.layer)
    if isinstance(layer, FrozenBatchNorm):
        layer.__class__ = _BATCH_NORMS[use.delta.dim()]
    layer.input0, layer.output = use.inputs[0], use.delta
    extension(layer, (None,), (use.delta,))
    return {p: vars(p).pop(extension.savefield) for p in trainable(layer)}


def _zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, requires_grad=False)
