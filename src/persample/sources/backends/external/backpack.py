"""Backend `"backpack"`: BackPACK's BatchGrad and SumGradSquared, by its own machinery or for single layers."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable

import torch
from backpack.extensions import BatchGrad, SumGradSquared
from torch import Tensor, nn

from persample.frozen_batch_norm import FrozenBatchNorm
from persample.moments import Moments
from persample.sources.backends.external.backpack_extend import BackpackExtend
from persample.sources.backends.external.backpack_layers import BATCH_NORMS, reason_against
from persample.sources.backends.external.layer_rules import LayerCall, PeerRulesSource, trainable
from persample.sources.backends.external.source import PeerSource
from persample.sources.batch import Batch

# Neither holds anything of a call, and to make one takes as long as to use it on a small layer.
_BATCH_GRAD = BatchGrad()
_SUM_GRAD_SQUARED = SumGradSquared()


class BackpackRules(PeerRulesSource):
    """Per-sample gradients by BackPACK's extensions, applied layer by layer.

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

    def square_sums(self, uses: Iterable[LayerCall]) -> dict[nn.Parameter, Tensor]:
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

    def rows(self, use: LayerCall) -> dict[nn.Parameter, Tensor]:
        return _extended(_BATCH_GRAD, use)

    def reason_against(self, layer: nn.Module) -> str | None:
        return reason_against(layer)


class BackpackSource(PeerSource):
    """Per-sample gradients by BackPACK (Dangel, Kunstner and Hennig, 2020, arXiv:1912.10985).

    `per_sample` is `BatchGrad`, `moments` is `SumGradSquared` beside the ordinary gradient of the same backward pass,
    both with the sum of the losses, so that nothing has to be scaled.

    Args:
        model: the network.
        loss_fn: the loss of each sample.
        check: when the self-check runs.
        machinery: `"extend"` is BackPACK's `extend`, of modules that share the parameters of the model, so that no
            trace is left, and `with backpack(...)`. `"rules"` are its extensions applied to single layers, called
            from hooks of this package. `"auto"` is the first, unless something is found in the model, or in its
            forward pass, that it is known to get wrong, and then the second.

    Raises:
        OptionError: `machinery` is not known.
    """

    own = "extend"
    by_machinery = BackpackExtend
    by_rules = BackpackRules


def _is_summable(use: LayerCall, times: Counter[nn.Parameter]) -> bool:
    """Whether SumGradSquared serves this use.

    It does not if a parameter is used elsewhere too, because all uses must be added up before they are squared. On a
    sequence of L positions its contraction for linear layers needs B·L·I·O numbers where opt_einsum is missing.
    """
    on_sequence = isinstance(use.layer, nn.Linear) and use.delta.dim() > 2
    return not on_sequence and all(times[p] == 1 for p in trainable(use.layer))


def _square_sums(use: LayerCall) -> dict[nn.Parameter, Tensor]:
    """Σ_i g_i² for the parameters of one layer."""
    return _extended(_SUM_GRAD_SQUARED, use)


def _extended(extension: BatchGrad | SumGradSquared, use: LayerCall) -> dict[nn.Parameter, Tensor]:
    """Apply `extension` to one use, as BackPACK's backward hook would."""
    # A copy that shares the parameters, so that the attributes which BackPACK reads are not put on the user's module.
    layer = copy.copy(use.layer)
    if isinstance(layer, FrozenBatchNorm):
        layer.__class__ = BATCH_NORMS[use.delta.dim()]
    layer.input0, layer.output = use.inputs[0], use.delta
    extension(layer, (None,), (use.delta,))
    return {p: vars(p).pop(extension.savefield) for p in trainable(layer)}


def _zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, requires_grad=False)
