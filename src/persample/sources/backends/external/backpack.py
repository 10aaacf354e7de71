"""Backend `"backpack"`: BackPACK's BatchGrad and SumGradSquared, by its own machinery or for single layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from persample.moments import Moments
from persample.sources.backends.external.backpack_extend import BackpackExtend
from persample.sources.backends.external.backpack_layers import reason_against
from persample.sources.backends.external.backpack_norms import (
    BATCH_GRAD,
    BATCH_L2_GRAD,
    SUM_GRAD_SQUARED,
    extended,
    reason_against_norms,
    weighted_sum,
)
from persample.sources.backends.external.layer_gradients import LayerCall, trainable
from persample.sources.backends.external.layer_rules import PeerRulesSource, only
from persample.sources.backends.external.source import PeerSource
from persample.sources.batch import Batch


class BackpackRules(PeerRulesSource):
    """Per-sample gradients by BackPACK's extensions, applied layer by layer.

    `per_sample` is `BatchGrad`, `moments` is `SumGradSquared` beside the ordinary gradient of the same backward pass,
    both with the sum of the losses, so that nothing has to be scaled. The extensions are called for each layer once
    its input and the gradient at its output are known; BackPACK's context and hooks are not used.

    BackPACK serves linear layers, convolutions and their transposes, embeddings, and BatchNorm in eval mode, each as
    the exact class. A parameter that is used more than once is served by `BatchGrad` in `moments` too: all uses are
    added up for each sample before they are squared.
    """

    package, by_gradients, by_norms = "BackPACK", "BatchGrad", "BatchL2Grad"
    norms_form_gradients = True

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
                squares |= self.by_rule(_squares, use)
            else:
                others.append(use)
        return squares | super().square_sums(others)

    def rows(self, use: LayerCall) -> dict[nn.Parameter, Tensor]:
        return extended(BATCH_GRAD, use)

    def reason_against(self, layer: nn.Module) -> str | None:
        return reason_against(layer)

    def reason_against_norms(self, use: LayerCall) -> str:
        return reason_against_norms(use)

    def squared_norms(self, use: LayerCall) -> Mapping[nn.Parameter, Tensor]:
        return extended(BATCH_L2_GRAD, use)

    def own_squares(self, uses: Sequence[LayerCall], rows: int) -> Tensor | None:
        if len(uses) > 1 or _on_sequence(uses[0]):
            return None
        return reduce(torch.add, [only(self.by_rule(_squares, part)) for part in self.parts(uses[0], rows)])

    def own_weighted_sum(self, use: LayerCall, weights: Tensor) -> Tensor | None:
        return only(self.by_rule(lambda use: weighted_sum(use, weights), use))


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
    return not _on_sequence(use) and all(times[p] == 1 for p in trainable(use.layer))


def _on_sequence(use: LayerCall) -> bool:
    return isinstance(use.layer, nn.Linear) and use.delta.dim() > 2


def _squares(use: LayerCall) -> dict[nn.Parameter, Tensor]:
    """Σ_i g_i² for the parameters of one layer."""
    return extended(SUM_GRAD_SQUARED, use)


def _zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, requires_grad=False)
