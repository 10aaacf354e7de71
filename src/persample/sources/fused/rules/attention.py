"""Scaled dot-product attention with parameters in it: a relative position bias as mask, or learned queries.

PyTorch computes softmax(q kᵀ / √d + mask) v in one step. Here it is taken apart, and the rules of the steps serve the
parameters. The random numbers of the dropout are the same.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from persample.sources.fused.capture import Capture


def attention(
    capture: Capture,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention`; `query` is `(…, H, L, d)`, `key` and `value` are `(…, H, S, d)`."""
    with capture:
        if enable_gqa:
            key, value = (_for_all_heads(x, query.shape[-3] // x.shape[-3]) for x in (key, value))
        scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        # PyTorch gives zero to a query that may look at nothing, where softmax gives 0/0.
        nothing = (scores == -math.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
        return F.dropout(weights, dropout_p) @ value


def _for_all_heads(x: Tensor, times: int) -> Tensor:
    """Each head of `x`, dim -3, as often as queries share it."""
    return x.unsqueeze(-3).expand(*x.shape[:-2], times, *x.shape[-2:]).flatten(-4, -3)
