"""Sums of outer products in groups, g_i = Σ_l δ_il a_ilᵀ in each: any layer whose inputs can be unfolded."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from persample.kernels.library import operator
from persample.kernels.linear import linear_squared_norms
from persample.kernels.pieces import Sums, added_up, samples_at_once, squared_norms


def check(delta: Tensor, a: Tensor) -> None:
    """Raise a ValueError if the shapes do not fit each other."""
    apart = delta.dim() != 4 or a.dim() != 4 or delta.shape[:2] != a.shape[:2] or delta.shape[3] != a.shape[3]
    if apart:
        shapes = f"{tuple(delta.shape)} and {tuple(a.shape)}"
        raise ValueError(f"gradients and inputs of shapes {shapes}: they must be (B, G, O, L) and (B, G, I, L).")


def _fake_moments(delta: Tensor, a: Tensor) -> Sums:
    check(delta, a)
    shape = delta.shape[1], delta.shape[2], a.shape[2]
    return delta.new_empty(shape), delta.new_empty(shape)


def _fake_norms(delta: Tensor, a: Tensor) -> Tensor:
    check(delta, a)
    return delta.new_empty(len(delta))


def _fake_weighted(delta: Tensor, a: Tensor, weights: Tensor) -> Tensor:
    return _fake_moments(delta, a)[0]


@operator("outer_moments(Tensor delta, Tensor a) -> (Tensor, Tensor)", _fake_moments)
def outer_moments(delta: Tensor, a: Tensor) -> Sums:
    """Return Σ_i g_i and Σ_i g_i², each `(G, O, I)`, for δ `(B, G, O, L)` and a `(B, G, I, L)`."""
    check(delta, a)
    if a.shape[3] == 1:
        # One position: g_i² = (δ_i)² (a_iᵀ)², so that no per-sample gradient is needed (Goodfellow, 2015).
        return product(delta, a), product(delta.square(), a.square())
    return added_up(_pieces(delta, a))


@operator("outer_squared_norms(Tensor delta, Tensor a) -> Tensor", _fake_norms)
def outer_squared_norms(delta: Tensor, a: Tensor) -> Tensor:
    """Return ‖g_i‖², `(B,)`, of the same."""
    check(delta, a)
    if a.shape[1] == 1:
        return linear_squared_norms(a.squeeze(1).mT, delta.squeeze(1).mT)
    if a.shape[3] == 1:
        return (delta.square().sum((2, 3)) * a.square().sum((2, 3))).sum(1)
    return torch.cat([squared_norms(g) for g in _pieces(delta, a)])


@operator("outer_weighted_sum(Tensor delta, Tensor a, Tensor weights) -> Tensor", _fake_weighted)
def outer_weighted_sum(delta: Tensor, a: Tensor, weights: Tensor) -> Tensor:
    """Return Σ_i w_i g_i, `(G, O, I)`, of the same."""
    check(delta, a)
    if a.shape[3] == 1:
        return product(delta * weights.to(delta.dtype).view(-1, 1, 1, 1), a)
    # To form them costs less than to put all positions of all samples side by side.
    total = delta.new_zeros(delta.shape[1], delta.shape[2], a.shape[2])
    start = 0
    for g in _pieces(delta, a):
        total += torch.tensordot(weights[start : start + len(g)].to(g.dtype), g, 1)
        start += len(g)
    return total


def _pieces(delta: Tensor, a: Tensor) -> Iterator[Tensor]:
    """The gradients of some samples after the other, `(b, G, O, I)`."""
    rows = samples_at_once(delta.shape[1] * delta.shape[2] * a.shape[2], delta.device)
    for d, x in zip(delta.split(rows), a.split(rows), strict=True):
        yield d @ x.mT


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return Σ_i Σ_l left_il right_ilᵀ, `(G, O, I)`, for factors of the shapes of δ and a."""
    products: Tensor = torch.einsum("bgol,bgil->goi", left, right)
    return products.contiguous()
