"""y_l = E[v_l]: row v of g_i is the sum of δ over the positions of sample i that hold v."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from persample.errors import UnsupportedModelError
from persample.sources.contributions import Lookups

if TYPE_CHECKING:
    from persample.sources.fused.capture import Capture


def embedding(
    capture: Capture,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """`F.embedding`."""
    if max_norm is not None or scale_grad_by_freq:
        raise UnsupportedModelError(
            "F.embedding was called with max_norm or scale_grad_by_freq: the first rewrites the weight, the second "
            "mixes the samples. Leave them away."
        )
    layout = capture.layout(input, "F.embedding")
    count, width = weight.shape
    after = layout.with_features(1, width)
    result = F.embedding(input, capture.value(weight), padding_idx)

    def contribution(delta: Tensor, indices: Tensor) -> Lookups:
        v = layout.sample_first(indices, 1).squeeze(-1).long()
        d = after.sample_first(delta, width)
        if padding_idx is not None:
            # The row of the padding index gets no gradient.
            d = d * (v != padding_idx % count).unsqueeze(-1)
        return Lookups(v, d, count)

    return capture.tap(result, after, [(weight, contribution)], (input,))
