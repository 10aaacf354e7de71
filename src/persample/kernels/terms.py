"""Sums of gradients that are sums of terms: biases, and the scales of normalisations."""

from __future__ import annotations

from torch import Tensor

from persample.kernels.library import operator
from persample.kernels.pieces import Sums, squares_of


def _check(terms: Tensor) -> None:
    if terms.dim() < 2:
        raise ValueError(f"terms of shape {tuple(terms.shape)}: samples and terms must come first, as (B, L, *S).")


def _fake(terms: Tensor) -> Sums:
    _check(terms)
    return terms.new_empty(terms.shape[2:]), terms.new_empty(terms.shape[2:])


@operator("term_moments(Tensor terms) -> (Tensor, Tensor)", _fake)
def term_moments(terms: Tensor) -> Sums:
    """Return Σ_i g_i and Σ_i g_i² of g_i = Σ_l t_il, each `(*S)`, for terms of shape `(B, L, *S)`."""
    _check(terms)
    if terms.shape[1] == 1:  # the terms are the caller's: they must not be squared in place
        g = terms.squeeze(1)
        return g.sum(0), g.square().sum(0)
    g = terms.sum(1)
    return g.sum(0), squares_of(g)
