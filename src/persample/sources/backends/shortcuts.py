"""Norms, weighted sums and products of one contribution's gradients, without forming them all.

Index legend: as in `contributions`. With g_i = Σ_l δ_il a_ilᵀ:

- one position: ‖g_i‖² = ‖δ_i‖² ‖a_i‖², and G Gᵀ = (Δ Δᵀ) ∘ (A Aᵀ);
- many: ‖g_i‖² = Σ_ll' (δ_il·δ_il') (a_il·a_il') (Goodfellow, 2015; Li et al., 2022), where that is cheaper than g_i;
- Σ_i w_i g_i = Σ_il (w_i δ_il) a_ilᵀ, the ordinary product.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import singledispatch

import torch
from torch import Tensor

from persample.kernels import pieces
from persample.kernels.lookups import add_up, lookup_squared_norms
from persample.kernels.outer import outer_squared_norms, outer_weighted_sum
from persample.kernels.pairs import products_of_pairs
from persample.quantities.block import as_matrix
from persample.sources.backends.contributions import Contribution, Lookups, OuterProducts, Terms

#: As many numbers as are formed at once where the pieces must meet each other.
_MEETING = 2**22


def pieces_of(contribution: Contribution, size: int, width: int, budget: int = 2**20) -> Iterator[tuple[slice, Tensor]]:
    """Yield the gradients in chunks of samples, of `size` samples with `width` numbers each."""
    rows = max(1, budget // max(1, width))
    for start in range(0, size, rows):
        where = slice(start, min(size, start + rows))
        yield where, contribution.take(where).per_sample()


def products_of_pieces(contribution: Contribution, size: int, width: int) -> Tensor:
    """Return g_i·g_j, shape `(size, size)`, from two pieces at a time."""
    products: Tensor | None = None
    for here, g in pieces_of(contribution, size, width, _MEETING):
        rows = as_matrix(g)
        if products is None:
            products = rows.new_empty(size, size)
        products[here, here] = products_of_pairs(rows, rows)
        rest = contribution.take(slice(here.stop, size))
        for there, h in pieces_of(rest, size - here.stop, width, _MEETING):
            met = slice(here.stop + there.start, here.stop + there.stop)
            products[here, met] = found = products_of_pairs(rows, as_matrix(h))
            products[met, here] = found.mT
    assert products is not None  # a batch has samples
    return products


@singledispatch
def squared_norms(contribution: Contribution, size: int, width: int) -> Tensor:
    """Return ‖g_i‖², shape `(size,)`; a gradient has `width` numbers."""
    return torch.cat([_squares(g) for _, g in pieces_of(contribution, size, width)])


@singledispatch
def moments_and_norms(contribution: Contribution, size: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return Σ_i g_i, Σ_i g_i² and ‖g_i‖²; one pass over gradients that must be formed gives all three."""
    return *contribution.sums(), squared_norms(contribution, size, width)


@singledispatch
def numbers_held(contribution: Contribution) -> int:
    """Return how many numbers the factors are that a contribution holds, where forming the gradients may be better.

    Elsewhere that is none: all that is asked for is cheaper to have from the factors.
    """
    return 0


@singledispatch
def weighted_sum(contribution: Contribution, weights: Tensor, width: int) -> Tensor:
    """Return Σ_i w_i g_i."""
    total: Tensor | None = None
    for where, g in pieces_of(contribution, len(weights), width):
        part = torch.tensordot(weights[where].to(g.dtype), g, 1)
        total = part if total is None else total + part
    assert total is not None  # a batch has samples
    return total


@singledispatch
def gram(contribution: Contribution, size: int, width: int) -> Tensor:
    """Return g_i·g_j, shape `(size, size)`."""
    return products_of_pieces(contribution, size, width)


def gram_of_one_position(delta: Tensor, a: Tensor) -> Tensor:
    """Return (Δ Δᵀ) ∘ (A Aᵀ), for δ and a of shapes `(B, O)` and `(B, I)`."""
    return products_of_pairs(delta, delta).mul_(products_of_pairs(a, a))


def scaled(delta: Tensor, weights: Tensor) -> Tensor:
    """Return w_i δ_i, with the sample in dim 0."""
    return delta * weights.to(delta.dtype).view(-1, *[1] * (delta.dim() - 1))


def _squares(values: Tensor) -> Tensor:
    return pieces.squared_norms(as_matrix(values))


@numbers_held.register
def _(contribution: OuterProducts) -> int:
    return contribution.delta.numel() + contribution.a.numel()


@squared_norms.register
def _(contribution: OuterProducts, size: int, width: int) -> Tensor:
    return outer_squared_norms(contribution.delta, contribution.a)


@weighted_sum.register
def _(contribution: OuterProducts, weights: Tensor, width: int) -> Tensor:
    return outer_weighted_sum(contribution.delta, contribution.a, weights).view(contribution.shape)


@gram.register
def _(contribution: OuterProducts, size: int, width: int) -> Tensor:
    if contribution.a.shape[-1] > 1:
        return products_of_pieces(contribution, size, width)
    delta, a = contribution.delta.squeeze(-1), contribution.a.squeeze(-1)
    products: Tensor = torch.einsum("bgo,cgo->gbc", delta, delta).mul_(torch.einsum("bgi,cgi->gbc", a, a)).sum(0)
    return products


@numbers_held.register
def _(contribution: Terms) -> int:
    return contribution.terms.numel() if contribution.terms.shape[1] > 1 else 0


def _summed(contribution: Terms) -> Tensor:
    """The gradients; a single term is one."""
    terms = contribution.terms
    return terms.squeeze(1) if terms.shape[1] == 1 else contribution.per_sample()


@squared_norms.register
def _(contribution: Terms, size: int, width: int) -> Tensor:
    return _squares(_summed(contribution))


@weighted_sum.register
def _(contribution: Terms, weights: Tensor, width: int) -> Tensor:
    g = _summed(contribution)
    total: Tensor = torch.tensordot(weights.to(g.dtype), g, 1)
    return total


@gram.register
def _(contribution: Terms, size: int, width: int) -> Tensor:
    g = as_matrix(_summed(contribution))
    return g @ g.mT


@squared_norms.register
def _(contribution: Lookups, size: int, width: int) -> Tensor:
    return lookup_squared_norms(contribution.indices, contribution.delta, contribution.count)


@weighted_sum.register
def _(contribution: Lookups, weights: Tensor, width: int) -> Tensor:
    return add_up(contribution.indices, scaled(contribution.delta, weights), contribution.count)


@gram.register
def _(contribution: Lookups, size: int, width: int) -> Tensor:
    # The rows of the table that nobody looks up are zero for all samples.
    found, place = contribution.indices.unique(return_inverse=True)
    if len(found) == contribution.count:
        return products_of_pieces(contribution, size, width)
    few = Lookups(place, contribution.delta, len(found))
    return products_of_pieces(few, size, len(found) * contribution.delta.shape[-1])
