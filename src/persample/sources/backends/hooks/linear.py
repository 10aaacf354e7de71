"""Linear layer: y_l = W a_l + b at each position l, so g_i = Σ_l δ_il a_ilᵀ."""

from __future__ import annotations

from torch import Tensor, nn

from persample.sources.backends.contributions import Contribution, OuterProducts, Terms


def linear(module: nn.Linear, a: Tensor, delta: Tensor) -> dict[str, Contribution]:
    """Return the contributions of one call; `a` is `(B, …, I)` and `delta` is `(B, …, O)`."""
    a, delta = _positions(a), _positions(delta)
    return {
        "weight": OuterProducts(delta.mT.unsqueeze(1), a.mT.unsqueeze(1), module.weight.shape),
        "bias": Terms(delta),
    }


def _positions(x: Tensor) -> Tensor:
    """`(B, …, F)` as `(B, L, F)`."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)
