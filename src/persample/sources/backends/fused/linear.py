"""The products of a linear layer, each in whichever exact form is the fastest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from persample.sources.backends.contributions import samples_at_once, squares_of
from persample.sources.backends.fused.autotune import COMPILED, Key, choose
from persample.sources.backends.fused.onednn import product_for
from persample.sources.backends.shortcuts import (
    gram,
    gram_of_one_position,
    norms_of_products,
    pieces_of,
    products_of_pairs,
    scaled,
    squared_norms,
    weighted_sum,
)

Sums = tuple[Tensor, Tensor]
Form = TypeVar("Form", bound=Callable[..., object])


@dataclass(frozen=True)
class LinearProducts:
    """g_i = Σ_l δ_il a_ilᵀ: the weight of a linear layer.

    Attributes:
        delta: δ, shape `(B, L, O)`.
        a: the inputs, shape `(B, L, I)`.
    """

    delta: Tensor
    a: Tensor

    def take(self, samples: slice) -> LinearProducts:
        return LinearProducts(self.delta[samples], self.a[samples])

    def per_sample(self) -> Tensor:
        return self.delta.mT @ self.a

    def sums(self) -> Sums:
        kind = (self.delta.shape[2], self.a.shape[2], self.a.dtype, self.a.device)
        batch, positions = self.delta.shape[:2]
        if positions == 1:
            delta, a = self.delta.squeeze(1), self.a.squeeze(1)
            return choose(Key(("linear", kind), (batch,)), lambda: _likely_first(one_position(a), delta, a), delta, a)
        key = Key(("linear on positions", kind), (batch, positions))
        return choose(key, lambda: many_positions(self.delta, self.a), self.delta, self.a)


def one_position(a: Tensor) -> dict[str, Callable[[Tensor, Tensor], Sums]]:
    """Forms for inputs like `a`. g_i² = (δ_i)² (a_iᵀ)², so both sums are products over the batch (Goodfellow, 2015)."""
    forms: dict[str, Callable[[Tensor, Tensor], Sums]] = {
        "blas": lambda delta, a: (delta.mT @ a, delta.square().mT @ a.square())
    }
    product = product_for(a)
    if product is not None:

        def onednn(delta: Tensor, a: Tensor) -> Sums:
            d, x = (t.mT.clone(memory_format=torch.contiguous_format) for t in (delta, a))
            return product(d, x), product(d.square_(), x.square_())

        forms[COMPILED] = onednn
    return forms


def _likely_first(forms: dict[str, Form], left: Tensor, right: Tensor) -> dict[str, Form]:
    """Return `forms` with the likely winner first: oneDNN, where it is there and the weight is worth its trouble."""
    likely = next((name for name in forms if name.startswith(COMPILED)), None)
    if likely is None or left.shape[-1] * right.shape[-1] < 2**14:
        return forms
    return {likely: forms.pop(likely), **forms}


def outputs_of(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x Wᵀ + b, `(N, O)`, for x of shape `(*lengths, I)` with N rows, by the fastest product."""
    rows = x.reshape(-1, x.shape[-1])

    def forms() -> dict[str, Callable[..., tuple[Tensor]]]:
        found: dict[str, Callable[..., tuple[Tensor]]] = {"blas": lambda x, w, b: (F.linear(x, w, b),)}
        product = product_for(rows)
        if product is not None:
            found[COMPILED] = lambda x, w, b: (product(x, w, b),)
        return _likely_first(found, rows, weight.mT)

    key = Key(("outputs", weight.shape, bias is None, x.dtype, x.device), tuple(x.shape[:-1]))
    return choose(key, forms, rows, weight, bias)[0]


def gradient_of_inputs(delta: Tensor, weight: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Return δ W, `(*lengths, I)`, for δ of shape `(N, O)`, by the fastest product."""

    def forms() -> dict[str, Callable[..., tuple[Tensor]]]:
        found: dict[str, Callable[..., tuple[Tensor]]] = {"blas": lambda delta, w: (delta @ w,)}
        product = product_for(delta)
        if product is not None:
            found[COMPILED] = lambda delta, w: (product(delta, w.mT),)
        return _likely_first(found, delta, weight)

    key = Key(("inputs", weight.shape, delta.dtype, delta.device), lengths)
    return choose(key, forms, delta, weight)[0].view(*lengths, weight.shape[1])


def many_positions(delta: Tensor, a: Tensor) -> dict[str, Callable[[Tensor, Tensor], Sums]]:
    """Forms for tensors like these. Positions are summed before squaring, so the g_i are formed, a few at a time."""
    forms: dict[str, Callable[[Tensor, Tensor], Sums]] = {
        "batched": _batched,
        "blas one by one": lambda delta, a: _one_by_one(delta, a, lambda d, x: d.mT @ x),
    }
    if delta.shape[-1] * a.shape[-1] > 2**15 and not delta.is_cuda:  # the likely winner first
        forms = dict(reversed(forms.items()))
    product = product_for(a)
    if product is not None:
        forms[f"{COMPILED} one by one"] = lambda delta, a: _one_by_one(delta, a, lambda d, x: product(d.mT, x.mT))
    return forms


def _batched(delta: Tensor, a: Tensor) -> Sums:
    total = delta.new_zeros(delta.shape[2], a.shape[2])
    squares = torch.zeros_like(total)
    rows = samples_at_once(total.numel(), delta.device, 2**18)
    for d, x in zip(delta.split(rows), a.split(rows), strict=True):
        g = d.mT @ x
        total += g.sum(0)
        squares += squares_of(g)
    return total, squares


def _one_by_one(delta: Tensor, a: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Sums:
    total = delta.new_zeros(delta.shape[2], a.shape[2])
    squares = torch.zeros_like(total)
    for d, x in zip(delta, a, strict=True):
        g = product(d, x)
        total += g
        squares.addcmul_(g, g)
    return total, squares


@squared_norms.register
def _(contribution: LinearProducts, size: int, width: int) -> Tensor:
    found = norms_of_products(contribution.delta, contribution.a)
    if found is not None:
        return found
    return torch.cat([g.flatten(1).square().sum(1) for _, g in pieces_of(contribution, size, width, 2**18)])


@weighted_sum.register
def _(contribution: LinearProducts, weights: Tensor, width: int) -> Tensor:
    delta, a = contribution.delta, contribution.a
    return scaled(delta, weights).flatten(0, 1).mT @ a.flatten(0, 1)


@gram.register
def _(contribution: LinearProducts, size: int, width: int) -> Tensor:
    if contribution.delta.shape[1] == 1:
        return gram_of_one_position(contribution.delta.squeeze(1), contribution.a.squeeze(1))
    return products_of_pairs(contribution, size, width)
