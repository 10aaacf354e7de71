"""Sums of gradients of a table: g_i[v] = Σ_l δ_il over the positions l of sample i that hold index v."""

from __future__ import annotations

import torch
from torch import Tensor

from persample.kernels.library import operator
from persample.kernels.pieces import Sums


def _check(indices: Tensor, delta: Tensor) -> None:
    if delta.dim() != 3 or indices.shape != delta.shape[:2]:
        shapes = f"{tuple(indices.shape)} and {tuple(delta.shape)}"
        raise ValueError(f"indices and gradients of shapes {shapes}: they must be (B, L) and (B, L, D).")


def _fake_moments(indices: Tensor, delta: Tensor, count: int) -> Sums:
    _check(indices, delta)
    return delta.new_empty(count, delta.shape[2]), delta.new_empty(count, delta.shape[2])


def _fake_norms(indices: Tensor, delta: Tensor, count: int) -> Tensor:
    _check(indices, delta)
    return delta.new_empty(len(delta))


@operator("lookup_moments(Tensor indices, Tensor delta, SymInt count) -> (Tensor, Tensor)", _fake_moments)
def lookup_moments(indices: Tensor, delta: Tensor, count: int) -> Sums:
    """Return Σ_i g_i and Σ_i g_i², each `(count, D)`, for indices `(B, L)` and δ `(B, L, D)`.

    Only the rows that a sample looks up are formed: one for each pair of sample and index that occurs.
    """
    _check(indices, delta)
    pairs, g = _rows(indices, delta, count)
    index = pairs % count
    return add_up(index, g, count), add_up(index, g.square(), count)


@operator("lookup_squared_norms(Tensor indices, Tensor delta, SymInt count) -> Tensor", _fake_norms)
def lookup_squared_norms(indices: Tensor, delta: Tensor, count: int) -> Tensor:
    """Return ‖g_i‖², `(B,)`, of the same."""
    _check(indices, delta)
    pairs, g = _rows(indices, delta, count)
    return g.new_zeros(len(delta)).index_add_(0, pairs // count, g.square().sum(1))


def _rows(indices: Tensor, delta: Tensor, count: int) -> Sums:
    """Return i · count + v, and the row g_i[v], for each pair of sample i and index v that occurs."""
    sample = torch.arange(len(indices), device=indices.device).unsqueeze(1)
    numbers = sample * count + indices
    pairs, place = unique_at_most(numbers) if numbers.is_cuda else numbers.unique(return_inverse=True)
    return pairs, add_up(place, delta, len(pairs))


def unique_at_most(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """As `numbers.unique(return_inverse=True)`, padded with zeros to the length of `numbers`.

    So the shape does not depend on the values, for which a GPU would have to be waited for.
    """
    ordered, order = numbers.flatten().sort()
    new = torch.ones_like(ordered)
    new[1:] = ordered[1:] != ordered[:-1]
    place = new.cumsum(0) - 1
    found = torch.zeros_like(ordered).scatter_(0, place, ordered)
    return found, torch.empty_like(place).scatter_(0, order, place).view(numbers.shape)


def add_up(index: Tensor, values: Tensor, rows: int) -> Tensor:
    """Return the sums of the `values`, `(…, D)`, with equal index, as `(rows, D)`."""
    width = values.shape[-1]
    return values.new_zeros(rows, width).index_add_(0, index.reshape(-1), values.reshape(-1, width))
