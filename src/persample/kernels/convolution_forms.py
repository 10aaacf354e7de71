"""The forms of the per-sample weight gradients of a convolution.

All of them compute g_i = Σ_l δ_il [[x]]_ilᵀ for a few samples at a time. They differ in what the processor is good at:

- `patches`: the input's windows are copied out, then one batched matrix product (few channels);
- `rows`: windows are copied out along all dimensions but the first; along the first they are views of the same copy
  that begin one row later (few channels, large kernels);
- `aligned-patches` and `aligned-rows`: the same, with zeros below the windows to make their number a multiple of 16, at
  which BLAS runs at up to twice the speed (a number of channels that is no such multiple);
- `products`: the windows as in `patches`, one matrix product of oneDNN for each sample (many channels);
- `grouped`: the weight gradient of a grouped convolution, in which each sample is a group;
- `single`: the weight gradient of a convolution, for one sample after the other (large weights).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from persample.kernels.autotune import COMPILED
from persample.kernels.images import Geometry, Images, gradients, padded, window_entries, window_view, windows
from persample.kernels.onednn import product_for
from persample.kernels.pieces import Sums, added_up, samples_at_once, squared_norms
from persample.kernels.unfolding import windows_of

_ALIGNMENT = 16  # numbers of float32 that the processor takes at a time


class Form(NamedTuple):
    """A way to form gradients, some samples at a time, and what is made of them.

    Attributes:
        pieces: forms the gradients of some samples after those of others.
        in_order: puts such a piece into the order of the weight, `(B, O, C/G, *K)`.
        dim: the dimension of the samples in a piece.
    """

    pieces: Callable[[Images], Iterator[Tensor]]
    in_order: Callable[[Tensor, Images], Tensor]
    dim: int = 0

    def moments(self, c: Images, norms: list[Tensor] | None = None) -> Sums:
        """Return Σ_i g_i and Σ_i g_i²; ‖g_i‖² are appended to `norms`."""
        total, squares = (
            self.in_order(sums.unsqueeze(self.dim), c)[0].contiguous()
            for sums in added_up(self.pieces(c), self.dim, norms)
        )
        return total, squares

    def norms(self, c: Images) -> tuple[Tensor]:
        """Return ‖g_i‖²; the order of the entries, and zeros among them, change none."""
        return (torch.cat([squared_norms(g, self.dim) for g in self.pieces(c)]),)

    def moments_and_norms(self, c: Images) -> tuple[Tensor, Tensor, Tensor]:
        """Return Σ_i g_i, Σ_i g_i² and ‖g_i‖²."""
        norms: list[Tensor] = []
        total, squares = self.moments(c, norms)
        return total, squares, torch.cat(norms)

    def per_sample(self, c: Images) -> tuple[Tensor]:
        """Return g_i in the order of the weight."""
        ordered = c.delta.new_empty(len(c.x) // c.images, *c.geometry.weight)
        start = 0
        for g in self.pieces(c):
            piece = self.in_order(g, c)
            ordered[start : start + len(piece)] = piece
            start += len(piece)
        return (ordered,)


def forms(c: Images) -> dict[str, Form]:
    """The forms worth trying for convolutions of the shape of `c`, the likely winner first."""
    found = _all_forms(c)
    outputs, channels = c.geometry.weight[:2]
    few = ("aligned-rows", "aligned-patches", "rows", "patches")
    kinds = ("grouped", "patches") if min(outputs, channels) >= 16 else few
    likely = [name for kind in kinds for name in found if name.startswith(kind)]
    # Of the few sizes of pieces the second is the likely one.
    first = likely[min(1, len(likely) - 1)]
    return {first: found.pop(first), **found}


def _all_forms(c: Images) -> dict[str, Form]:
    gradient = math.prod(c.geometry.weight)
    found: dict[str, Form] = {
        f"patches {rows}": Form(partial(_patches, rows=rows), _patches_in_order)
        for rows in pieces_within(c, max(gradient, window_entries(c)), 2**17, 2**19)
    }
    if c.images > 1 or c.x.numel() == 0:
        return found
    # oneDNN rounds the channels of each group up to multiples of 16, in memory that it takes beside the result, some
    # five times over. A model with so few channels is small, so it gets half of it.
    outputs, channels, *kernel = c.geometry.weight
    rounded = c.geometry.groups * _aligned(outputs // c.geometry.groups) * _aligned(channels) * math.prod(kernel)
    taken = rounded if rounded == gradient else 2 * rounded
    found |= {
        f"grouped {rows}": Form(partial(_grouped, rows=rows), _as_they_are)
        for rows in pieces_within(c, taken, 2**17, 2**18, 2**19)
    }
    if c.geometry.groups == 1 and c.geometry.stride[0] == 1 and c.geometry.weight[2] > 1:
        entries = max(gradient, window_entries(c) // c.geometry.weight[2])
        found |= {
            f"rows {rows}": Form(partial(_rows, rows=rows), _rows_in_order, dim=1)
            for rows in pieces_within(c, entries, 2**18, 3 * 2**17)
        }
        found |= _aligned_forms(c, "aligned-rows", entries, c.geometry.weight[2])
    if c.geometry.groups == 1:
        found |= _aligned_forms(c, "aligned-patches", max(gradient, window_entries(c)), 1)
    if c.geometry.groups == 1 and product_for(c.x) is not None and gradient > 2**14:
        found |= {
            f"{COMPILED} products {rows}": Form(partial(_products, rows=rows), _patches_in_order)
            for rows in pieces_within(c, max(gradient, window_entries(c)), 2**18, 2**20)
        }
    if gradient > 2**15:
        found["single"] = Form(partial(_grouped, rows=1), _as_they_are)
    return found


def _aligned_forms(c: Images, name: str, entries: int, shifts: int) -> dict[str, Form]:
    """The forms `aligned-rows` and `aligned-patches`, where they can help and add at most a fifth of zeros."""
    number = math.prod(c.geometry.weight[1:]) // shifts
    if c.geometry.weight[0] % _ALIGNMENT == 0 or 5 * _aligned(number) > 6 * number:
        return {}
    pieces = pieces_within(c, entries, 3 * 2**17, 2**19)
    return {
        f"{name} {rows}": Form(partial(_aligned_windows, rows=rows, shifts=shifts), _aligned_in_order, dim=1)
        for rows in pieces
    }


def _aligned(number: int) -> int:
    return -(-number // _ALIGNMENT) * _ALIGNMENT


def pieces_within(c: Images, entries: int, *budgets: int) -> list[int]:
    """How many samples to take at a time, so that what is made of them fits the cache: one number for each budget."""
    batch = len(c.x) // c.images
    return sorted({min(batch, samples_at_once(entries, c.x.device, budget)) for budget in budgets})


def _patches(c: Images, rows: int) -> Iterator[Tensor]:
    """`(B, C·K, O)`, or `(B, O, C/G, *K)` where there are groups or several images."""
    for part in c.in_parts(rows):
        if c.geometry.groups > 1 or c.images > 1:
            yield gradients(part)
        else:  # (C·K, L) (L, O): the larger factor first is the faster order.
            yield windows(part).squeeze(1) @ part.delta.flatten(2).mT


def _patches_in_order(g: Tensor, c: Images) -> Tensor:
    """`(B, C·K, O)`, or the gradients themselves, as `(B, O, C/G, *K)`."""
    return g if c.geometry.groups > 1 or c.images > 1 else g.mT.reshape(len(g), *c.geometry.weight)


def _products(c: Images, rows: int) -> Iterator[Tensor]:
    """The gradient of one sample after the other, `(1, C·K, O)`."""
    product = product_for(c.x)
    assert product is not None
    for part in c.in_parts(rows):
        for a, d in zip(windows(part).squeeze(1), part.delta.flatten(2), strict=True):
            yield product(a, d).unsqueeze(0)


def _rows(c: Images, rows: int) -> Iterator[Tensor]:
    """`(K₁, B, C · K₂, O)`: along l₁ nothing needs to be copied.

    g_i[o, c, k₁, k₂] = Σ_{l₁ l₂} δ_i[o, l₁, l₂] x_i[c, l₁ + d k₁, l₂ + k₂]
    """
    first = c.geometry.weight[2]
    width = math.prod(c.delta.shape[3:])  # of a row of windows
    for part in c.in_parts(rows):
        copied = _windows_along_rows(part).flatten(1, 1 + len(c.geometry.stride)).flatten(2)
        delta = part.delta.flatten(2).mT
        g = copied.new_empty(first, len(delta), copied.shape[1], delta.shape[2])
        for k in range(first):
            start = k * c.geometry.dilation[0] * width
            torch.bmm(copied[:, :, start : start + delta.shape[1]], delta, out=g[k])
        yield g


def _rows_in_order(g: Tensor, c: Images) -> Tensor:
    """`(K₁, B, C · K₂, O)` as `(B, O, C, K₁, K₂)`."""
    outputs, channels, first, *others = c.geometry.weight
    return g.view(first, g.shape[1], channels, *others, outputs).movedim((0, -1), (3, 1))


def _windows_along_rows(c: Images) -> Tensor:
    """The windows along all dimensions but the first, `(B, C, 1, *K₂, S₁, *L₂)`, a view of the input."""
    x, geometry = padded(c), c.geometry
    kernel, stride, dilation = ((1, *each[1:]) for each in (geometry.weight[2:], geometry.stride, geometry.dilation))
    return windows_of(x, kernel, stride, dilation, (x.shape[2], *c.delta.shape[3:]))


def _aligned_windows(c: Images, rows: int, shifts: int) -> Iterator[Tensor]:
    """As `_rows`, with K₁ shifts, or `_patches`, with one, but g_i = δ_i [[x]]_iᵀ with zeros below [[x]]_i.

    `(shifts, B, O, C·K and some zeros)`; several shifts go along K₁.
    """
    number = math.prod(c.geometry.weight[1:]) // shifts
    width = math.prod(c.delta.shape[3:])  # of a row of windows
    memory = None
    for part in c.in_parts(rows):
        seen, delta = _windows_along_rows(part) if shifts > 1 else window_view(part), part.delta.flatten(2)
        if memory is None:
            memory = seen.new_zeros(len(delta), _aligned(number), seen[0].numel() // number)
        aligned = memory[: len(delta)]
        aligned[:, :number].view(seen.shape).copy_(seen)
        g = delta.new_empty(shifts, *delta.shape[:2], _aligned(number))
        for k in range(shifts):
            start = k * c.geometry.dilation[0] * width
            torch.bmm(delta, aligned[:, :, start : start + delta.shape[2]].mT, out=g[k])
        yield g


def _aligned_in_order(g: Tensor, c: Images) -> Tensor:
    """`(shifts, B, O, C·K and some zeros)`, with several shifts along K₁, as `(B, O, C, *K)`."""
    outputs, channels, *kernel = c.geometry.weight
    copied = kernel if len(g) == 1 else [1, *kernel[1:]]
    of_windows = g[..., : channels * math.prod(copied)].reshape(*g.shape[:2], outputs, channels, *copied)
    return of_windows.movedim(0, 3).reshape(g.shape[1], *c.geometry.weight)


def _grouped(c: Images, rows: int) -> Iterator[Tensor]:
    """g_i of some samples by one grouped convolution, in which the weight's values do not matter."""
    outputs, *others = c.geometry.weight
    for part in c.in_parts(rows):
        batch = len(part.x)
        # Through one dimension, which leaves no doubt about strides: of images of one pixel the kernels take some for
        # channels last, and fail.
        delta, x = (t.reshape(-1).view(1, -1, *t.shape[2:]) for t in (part.delta, part.x))
        geometry = replace(c.geometry, weight=(batch * outputs, *others), groups=batch * c.geometry.groups)
        yield weight_gradient(delta, x, geometry).reshape(batch, *c.geometry.weight)


def _as_they_are(g: Tensor, c: Images) -> Tensor:
    return g


def weight_gradient(delta: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """Return the ordinary gradient of a convolution's weight, from δ and its input."""
    gradient: Tensor = torch.ops.aten.convolution_backward.default(
        delta,
        x,
        x.new_empty(geometry.weight),
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        [0] * len(geometry.stride),
        geometry.groups,
        [False, True, False],
    )[1]
    return gradient
