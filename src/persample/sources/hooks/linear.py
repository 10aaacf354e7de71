"""Linear layer: y_l = W a_l + b at each position l, so g_i = Σ_l δ_il a_ilᵀ."""

from __future__ import annotations

from torch import Tensor, nn

from persample.sources.contributions import Contribution, OuterProducts, Terms


def linear(module: nn.Linear, a: Tensor, delta: Tensor) -> dict[str, Contribution]:
    """Return the contributions of one call; `a` is `(B, …, I)` and `delta` is `(B, …, O)`."""
    a = a.reshape(len(a), -1, module.in_features)
    delta = delta.reshape(len(delta), -1, module.out_features)
    return {
        "weight": OuterProducts(delta.mT.unsqueeze(1), a.mT.unsqueeze(1), module.weight.shape),
        "bias": Terms(delta),
    }
