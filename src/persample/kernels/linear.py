"""The products of a linear layer, each in whichever exact form is the fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from persample.kernels.autotune import COMPILED, Key, choose
from persample.kernels.gpu import by_triton, kernels_for
from persample.kernels.library import operator
from persample.kernels.onednn import product_for
from persample.kernels.pieces import Sums, added_up, samples_at_once, squared_norms

Form = TypeVar("Form", bound=Callable[..., object])


def check(x: Tensor, delta: Tensor) -> None:
    """Raise a ValueError if the shapes do not fit each other."""
    if x.dim() != 3 or delta.dim() != 3 or x.shape[:2] != delta.shape[:2]:
        shapes = f"{tuple(x.shape)} and {tuple(delta.shape)}"
        raise ValueError(f"inputs and gradients of shapes {shapes}: they must be (B, L, I) and (B, L, O).")


def _fake_moments(x: Tensor, delta: Tensor) -> Sums:
    check(x, delta)
    shape = delta.shape[2], x.shape[2]
    return delta.new_empty(shape), delta.new_empty(shape)


def _fake_norms(x: Tensor, delta: Tensor) -> Tensor:
    check(x, delta)
    return delta.new_empty(len(delta))


@operator("linear_moments(Tensor x, Tensor delta) -> (Tensor, Tensor)", _fake_moments)
def linear_moments(x: Tensor, delta: Tensor) -> Sums:
    """Return Σ_i g_i and Σ_i g_i², each `(O, I)`, of g_i = Σ_l δ_il x_ilᵀ, for x `(B, L, I)` and δ `(B, L, O)`."""
    check(x, delta)
    kind = (delta.shape[2], x.shape[2], x.dtype, x.device)
    batch, positions = delta.shape[:2]
    if positions == 1:
        d, a = delta.squeeze(1), x.squeeze(1)
        return choose(Key(("linear", kind), (batch,)), lambda: _likely_first(one_position(a), d, a), d, a)
    key = Key(("linear on positions", kind), (batch, positions))
    return choose(key, lambda: many_positions(delta, x), delta, x)


@operator("linear_squared_norms(Tensor x, Tensor delta) -> Tensor", _fake_norms)
def linear_squared_norms(x: Tensor, delta: Tensor) -> Tensor:
    """Return ‖g_i‖², `(B,)`, of the same: Σ_ll' (δ_il·δ_il') (x_il·x_il') where that is cheaper than g_i.

    So Goodfellow (2015), and Li et al. (2022).
    """
    check(x, delta)
    positions, outputs, inputs = delta.shape[1], delta.shape[2], x.shape[2]
    if positions == 1:
        return delta.square().sum((1, 2)) * x.square().sum((1, 2))
    return (_norms_of_products if norms_from_products(positions, outputs, inputs) else _norms_of_gradients)(x, delta)


def _norms_of_gradients(x: Tensor, delta: Tensor) -> Tensor:
    return torch.cat([squared_norms(g) for g in _pieces(delta, x)])


def _norms_of_products(x: Tensor, delta: Tensor) -> Tensor:
    """Return ‖g_i‖² as sums of products, whose rounding errors are those of their terms.

    The terms are of the size of ‖δ_i‖² ‖x_i‖² / L, as is ‖g_i‖² where positions do not depend on each other. Where it
    is much less, because they cancel, it comes from g_i. A GPU is not asked whether they do: it has enough digits.
    """
    precise = torch.float64 if x.is_cuda else x.dtype
    d, a = [t.to(precise) @ t.to(precise).mT for t in (delta, x)]
    terms = _traces(d) * _traces(a) / len(d[0])
    norms = d.mul_(a).flatten(1).sum(1)
    if not x.is_cuda:
        lost = have_cancelled(norms, terms)
        if lost.any():
            norms[lost] = _norms_of_gradients(x[lost], delta[lost])
    return norms.clamp_(min=0).to(x.dtype)


def have_cancelled(norms: Tensor, terms: Tensor) -> Tensor:
    """Whether each ‖g_i‖² is too small for its digits to be right, as a sum of products of the size of `terms`."""
    least: float = torch.finfo(norms.dtype).eps ** (1 / 3)
    return norms < least * terms


def _traces(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2).sum(1)


def norms_from_products(positions: int, outputs: int, inputs: int) -> bool:
    """Whether the products of positions are cheaper than the gradients."""
    return positions == 1 or 2 * positions * (outputs + inputs) <= outputs * inputs


def _fake_moments_and_norms(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return *_fake_moments(x, delta), _fake_norms(x, delta)


@operator("linear_moments_and_norms(Tensor x, Tensor delta) -> (Tensor, Tensor, Tensor)", _fake_moments_and_norms)
def linear_moments_and_norms(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Σ_i g_i, Σ_i g_i² and ‖g_i‖² of the same, of gradients that are formed once where both need them."""
    check(x, delta)
    batch, positions = delta.shape[:2]
    if delta.is_cuda or (positions > 1 and norms_from_products(positions, delta.shape[2], x.shape[2])):
        return *linear_moments(x, delta), linear_squared_norms(x, delta)
    kind = ("with norms", delta.shape[2], x.shape[2], x.dtype, x.device)
    if positions == 1:
        d, a = delta.squeeze(1), x.squeeze(1)
        return choose(Key(("linear", kind), (batch,)), lambda: _joint(_likely_first(one_position(a), d, a)), d, a)
    key = Key(("linear on positions", kind), (batch, positions))
    return choose(key, lambda: _joint(_forming(delta, x)), delta, x)


def one_position(a: Tensor) -> dict[str, Callable[..., Sums]]:
    """Forms for inputs like `a`, which append the squared norms to `norms` if that is given.

    g_i² = (δ_i)² (a_iᵀ)², so both sums are products over the batch, and ‖g_i‖² = ‖δ_i‖² ‖a_i‖² (Goodfellow, 2015).
    """
    forms: dict[str, Callable[..., Sums]] = {"blas": _by_blas}
    product = product_for(a)
    if product is not None:
        forms[COMPILED] = partial(_by_columns, product=product)
    triton = kernels_for(a)
    if triton is not None:
        moments = triton.linear_moments
        forms["triton"] = lambda delta, a: by_triton(moments, a.unsqueeze(1), delta.unsqueeze(1))
    return forms


def _by_blas(delta: Tensor, a: Tensor, norms: list[Tensor] | None = None) -> Sums:
    d, x = delta.square(), a.square()
    if norms is not None:
        norms.append(d.sum(1) * x.sum(1))
    return delta.mT @ a, d.mT @ x


def _by_columns(
    delta: Tensor, a: Tensor, *, product: Callable[[Tensor, Tensor], Tensor], norms: list[Tensor] | None = None
) -> Sums:
    d, x = (t.mT.clone(memory_format=torch.contiguous_format) for t in (delta, a))
    total = product(d, x)
    d.square_(), x.square_()
    if norms is not None:
        norms.append(d.sum(0) * x.sum(0))
    return total, product(d, x)


def _likely_first(forms: dict[str, Form], left: Tensor, right: Tensor) -> dict[str, Form]:
    """Return `forms` with the likely winner first: oneDNN, where it is there and the weight is worth its trouble."""
    likely = next((name for name in forms if name.startswith(COMPILED)), None)
    if likely is None or left.shape[-1] * right.shape[-1] < 2**14:
        return forms
    return {likely: forms.pop(likely), **forms}


def _fake_weighted(x: Tensor, delta: Tensor, weights: Tensor) -> Tensor:
    return _fake_moments(x, delta)[0]


@operator("linear_weighted_sum(Tensor x, Tensor delta, Tensor weights) -> Tensor", _fake_weighted)
def linear_weighted_sum(x: Tensor, delta: Tensor, weights: Tensor) -> Tensor:
    """Return Σ_i w_i g_i, `(O, I)`, for x `(B, L, I)`, δ `(B, L, O)` and w `(B,)`."""
    check(x, delta)
    w = weights.to(delta.dtype).view(-1, 1, 1)
    if x.shape[1] > 1:
        return _weighted(delta, x, w)
    key = Key(("weighted", delta.shape[2], x.shape[2], x.dtype, x.device), (len(x),))
    return choose(key, lambda: _likely_first(_weighted_forms(x), delta, x), delta, x, w)[0]


def _weighted_forms(x: Tensor) -> dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor]]]:
    """Forms for one position."""
    forms: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor]]] = {
        "blas": lambda delta, x, w: (_weighted(delta, x, w),)
    }
    product = product_for(x)
    if product is not None:

        def by_columns(delta: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor]:
            d, a = (t.squeeze(1).mT.clone(memory_format=torch.contiguous_format) for t in (delta, x))
            return (product(d.mul_(w.flatten()), a),)

        forms[COMPILED] = by_columns
    return forms


def _weighted(delta: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """One factor takes the weights, the one by which fewer numbers are copied."""
    if delta.numel() + _copied(x) <= x.numel() + _copied(delta):
        delta = _scaled_in_order(delta, w)
    else:
        x = _scaled_in_order(x, w)
    return delta.flatten(0, 1).mT @ x.flatten(0, 1)


def _copied(factor: Tensor) -> int:
    """How many numbers are copied to put all positions of all samples into one dimension."""
    samples, positions = factor.shape[:2]
    one_behind_the_other = 1 in (samples, positions) or factor.stride(0) == positions * factor.stride(1)
    return 0 if one_behind_the_other else factor.numel()


def _scaled_in_order(factor: Tensor, w: Tensor) -> Tensor:
    return factor * w if _copied(factor) == 0 else factor.clone(memory_format=torch.contiguous_format).mul_(w)


def _fake_outputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[:-1].numel(), len(weight))


@operator("linear_outputs(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _fake_outputs)
def linear_outputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
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


def _fake_gradient(delta: Tensor, weight: Tensor, lengths: Sequence[int]) -> Tensor:
    return delta.new_empty(*lengths, weight.shape[1])


@operator("linear_gradient_of_inputs(Tensor delta, Tensor weight, SymInt[] lengths) -> Tensor", _fake_gradient)
def linear_gradient_of_inputs(delta: Tensor, weight: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return δ W, `(*lengths, I)`, for δ of shape `(N, O)`, by the fastest product."""

    def forms() -> dict[str, Callable[..., tuple[Tensor]]]:
        found: dict[str, Callable[..., tuple[Tensor]]] = {"blas": lambda delta, w: (delta @ w,)}
        product = product_for(delta)
        if product is not None:
            found[COMPILED] = lambda delta, w: (product(delta, w.mT),)
        return _likely_first(found, delta, weight)

    key = Key(("inputs", weight.shape, delta.dtype, delta.device), tuple(lengths))
    return choose(key, forms, delta, weight)[0].view(*lengths, weight.shape[1])


def many_positions(delta: Tensor, a: Tensor) -> dict[str, Callable[[Tensor, Tensor], Sums]]:
    """Forms for tensors like these. Positions are summed before squaring, so the g_i are formed, a few at a time."""
    forms = _forming(delta, a)
    triton = kernels_for(a)
    if triton is not None:
        # The first, which stays where results must repeat: on an H100 it was the fastest on every shape tried.
        forms = {"triton": lambda delta, a: by_triton(triton.linear_moments, a, delta), **forms}
    return forms


def _forming(delta: Tensor, a: Tensor) -> dict[str, Callable[..., Sums]]:
    """The forms that form the g_i, and append their squared norms to `norms` if that is given."""
    forms: dict[str, Callable[..., Sums]] = {
        "batched": _batched,
        "blas one by one": partial(_one_by_one, product=lambda d, x: d.mT @ x),
    }
    if delta.shape[-1] * a.shape[-1] > 2**15 and not delta.is_cuda:  # the likely winner first
        forms = dict(reversed(forms.items()))
    product = product_for(a)
    if product is not None:
        forms[f"{COMPILED} one by one"] = partial(_one_by_one, product=lambda d, x: product(d.mT, x.mT))
    return forms


def _joint(forms: dict[str, Callable[..., Sums]]) -> dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]]:
    """The same forms, with the squared norms as a third result."""
    return {name: partial(_with_norms, form) for name, form in forms.items()}


def _with_norms(form: Callable[..., Sums], delta: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    norms: list[Tensor] = []
    total, squares = form(delta, a, norms=norms)
    return total, squares, torch.cat(norms)


def _pieces(delta: Tensor, a: Tensor) -> Iterator[Tensor]:
    """The gradients of some samples after the other, `(b, O, I)`."""
    rows = samples_at_once(delta.shape[2] * a.shape[2], delta.device, 2**18)
    for d, x in zip(delta.split(rows), a.split(rows), strict=True):
        yield d.mT @ x


def _batched(delta: Tensor, a: Tensor, norms: list[Tensor] | None = None) -> Sums:
    return added_up(_pieces(delta, a), norms=norms)


def _one_by_one(
    delta: Tensor, a: Tensor, *, product: Callable[[Tensor, Tensor], Tensor], norms: list[Tensor] | None = None
) -> Sums:
    total = delta.new_zeros(delta.shape[2], a.shape[2])
    squares = torch.zeros_like(total)
    for d, x in zip(delta, a, strict=True):
        g = product(d, x)
        total += g
        squares.addcmul_(g, g)
        if norms is not None:
            norms.append(torch.linalg.vector_norm(g).square().unsqueeze(0))
    return total, squares
