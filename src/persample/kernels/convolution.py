"""Per-sample weight gradients of a convolution, in whichever exact form is the fastest for its shape.

All forms compute g_i = Σ_l δ_il [[x]]_ilᵀ for a few samples and add up g_i and g_i². They differ in what the processor
is good at:

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from persample.kernels.autotune import COMPILED, Key, choose
from persample.kernels.gpu import by_triton, kernels_for
from persample.kernels.library import operator
from persample.kernels.onednn import product_for
from persample.kernels.pieces import Sums, added_up, samples_at_once, squared_norms
from persample.kernels.unfolding import unfold, windows_of

Result = TypeVar("Result", bound=tuple[Tensor, ...])

_ALIGNMENT = 16  # numbers of float32 that the processor takes at a time


@dataclass(frozen=True)
class Geometry:
    """The shape of a convolution.

    Attributes:
        weight: shape of the weight, `(O, C/G, *K)`.
        stride: along each dimension, as the others.
        padding: zeros before and after each dimension.
        dilation: distance between the entries of a window.
        groups: G.
    """

    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class Images:
    """What goes through a convolution: g_i = Σ_l δ_il [[x]]_ilᵀ.

    Attributes:
        delta: δ, shape `(B·R, O, *L)`.
        x: the input, shape `(B·R, C, *S)`.
        geometry: the convolution.
        images: R, how many images a sample has; their gradients are added up.
    """

    delta: Tensor
    x: Tensor
    geometry: Geometry
    images: int = 1

    def take(self, samples: slice) -> Self:
        start, stop, _ = samples.indices(len(self.x) // self.images)
        part = slice(start * self.images, stop * self.images)
        return replace(self, delta=self.delta[part], x=self.x[part])

    def per_sample(self) -> Tensor:
        """Return g_i for each sample, shape `(B, O, C/G, *K)`."""
        return _patches(self)


_ARGUMENTS = (
    "(Tensor x, Tensor delta, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    "SymInt groups, SymInt images)"
)


def checked(x: Tensor, delta: Tensor, kernel_size: Sequence[int], *settings: Any) -> Images:
    """Return what goes through the convolution.

    Raises:
        ValueError: shapes and settings do not fit each other.
    """
    stride, padding, dilation, groups, images = settings
    dimensions = len(kernel_size)
    each = (stride, padding, dilation, x.shape[2:], delta.shape[2:])
    if any(len(sizes) != dimensions for sizes in each) or len(x) != len(delta) or len(x) % images:
        shapes = f"{tuple(x.shape)} and {tuple(delta.shape)}"
        raise ValueError(
            f"inputs and gradients of shapes {shapes}, with {images} images to a sample and a window of "
            f"{tuple(kernel_size)}: they must be (B·R, C, *S) and (B·R, O, *L), each setting one number a dimension."
        )
    if x.shape[1] % groups or delta.shape[1] % groups:
        raise ValueError(f"{x.shape[1]} and {delta.shape[1]} channels are not in {groups} equal groups.")
    weight = (delta.shape[1], x.shape[1] // groups, *kernel_size)
    return Images(delta, x, Geometry(weight, tuple(stride), tuple(padding), tuple(dilation), groups), images)


def _fake_moments(*arguments: Any) -> Sums:
    c = checked(*arguments)
    return c.delta.new_empty(c.geometry.weight), c.delta.new_empty(c.geometry.weight)


def _fake_norms(*arguments: Any) -> Tensor:
    c = checked(*arguments)
    return c.delta.new_empty(len(c.delta) // c.images)


def _fake_moments_and_norms(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return *_fake_moments(*arguments), _fake_norms(*arguments)


def _fake_per_sample(*arguments: Any) -> Tensor:
    c = checked(*arguments)
    return c.delta.new_empty(len(c.delta) // c.images, *c.geometry.weight)


@operator(f"convolution_moments{_ARGUMENTS} -> (Tensor, Tensor)", _fake_moments)
def convolution_moments(*arguments: Any) -> Sums:
    """Return Σ_i g_i and Σ_i g_i², each `(O, C/G, *K)`, for x `(B·R, C, *S)` and δ `(B·R, O, *L)`; see `arguments`."""
    c = checked(*arguments)
    return choose(key_of("convolution", c), lambda: _with_triton(c, forms(c)), c)


@operator(f"convolution_squared_norms{_ARGUMENTS} -> Tensor", _fake_norms)
def convolution_squared_norms(*arguments: Any) -> Tensor:
    """Return ‖g_i‖², `(B,)`, of the same."""
    c = checked(*arguments)
    return choose(key_of("norms of a convolution", c), lambda: norm_forms(c), c)[0]


@operator(f"convolution_moments_and_norms{_ARGUMENTS} -> (Tensor, Tensor, Tensor)", _fake_moments_and_norms)
def convolution_moments_and_norms(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return Σ_i g_i, Σ_i g_i² and ‖g_i‖² of the same, of gradients that are formed once for all three."""
    c = checked(*arguments)
    return choose(key_of("moments and norms of a convolution", c), lambda: _each(_moments_and_norms, c), c)


@operator(f"convolution_per_sample{_ARGUMENTS} -> Tensor", _fake_per_sample)
def convolution_per_sample(*arguments: Any) -> Tensor:
    """Return g_i, `(B, O, C/G, *K)`, of the same."""
    c = checked(*arguments)
    return choose(key_of("gradients of a convolution", c), lambda: per_sample_forms(c), c)[0]


def arguments(c: Images) -> tuple[Any, ...]:
    """What the operators are called with."""
    g = c.geometry
    return c.x, c.delta, g.weight[2:], g.stride, g.padding, g.dilation, g.groups, c.images


def key_of(what: str, c: Images) -> Key:
    """Return what decides which form of something is the fastest."""
    lengths = (len(c.x) // c.images, *c.x.shape[2:], *c.delta.shape[2:])
    return Key((what, c.geometry, c.images, c.x.dtype, c.x.device), lengths)


def _with_triton(c: Images, found: dict[str, Callable[[Images], Sums]]) -> dict[str, Callable[[Images], Sums]]:
    triton = kernels_for(c.x)
    if triton is None or c.x.dim() == 5:
        return found
    form = {"triton": lambda c: by_triton(triton.convolution_moments, *arguments(c))}
    return form | found if min(c.geometry.weight[:2]) >= 16 else found | form


def norm_forms(c: Images) -> dict[str, Callable[[Images], tuple[Tensor]]]:
    """The same ways to form gradients, some samples at a time, whose norms are taken in place of sums."""
    return _each(_norms, c)


def per_sample_forms(c: Images) -> dict[str, Callable[[Images], tuple[Tensor]]]:
    """The same ways to form gradients, which are put together in the order of the weight."""
    return _each(_per_sample, c)


def _each(made: Callable[..., Result], c: Images) -> dict[str, Callable[[Images], Result]]:
    """What is made of the gradients that each form forms."""
    return {name: partial(made, form) for name, form in forms(c).items()}


def _norms(form: Callable[[Images], Sums], c: Images) -> tuple[Tensor]:
    """The squared norms of what `form` adds up; the order of the entries, and zeros among them, change none."""
    assert isinstance(form, partial)
    pieces, dim, _ = _PIECES[form.func]
    return (torch.cat([squared_norms(g, dim) for g in pieces(c, **form.keywords)]),)


def _moments_and_norms(form: Callable[..., Sums], c: Images) -> tuple[Tensor, Tensor, Tensor]:
    norms: list[Tensor] = []
    total, squares = form(c, norms=norms)
    return total, squares, torch.cat(norms)


def _per_sample(form: Callable[[Images], Sums], c: Images) -> tuple[Tensor]:
    """The gradients that `form` adds up, in the order of the weight."""
    assert isinstance(form, partial)
    pieces, _, in_order = _PIECES[form.func]
    gradients = c.delta.new_empty(len(c.x) // c.images, *c.geometry.weight)
    start = 0
    for g in pieces(c, **form.keywords):
        ordered = in_order(g, c)
        gradients[start : start + len(ordered)] = ordered
        start += len(ordered)
    return (gradients,)


def forms(c: Images) -> dict[str, Callable[[Images], Sums]]:
    """The forms worth trying for convolutions of the shape of `c`, the likely winner first."""
    found = _all_forms(c)
    outputs, channels = c.geometry.weight[:2]
    few = ("aligned-rows", "aligned-patches", "rows", "patches")
    kinds = ("grouped", "patches") if min(outputs, channels) >= 16 else few
    likely = [name for kind in kinds for name in found if name.startswith(kind)]
    # Of the few sizes of pieces the second is the likely one.
    first = likely[min(1, len(likely) - 1)]
    return {first: found.pop(first), **found}


def _all_forms(c: Images) -> dict[str, Callable[[Images], Sums]]:
    gradient = math.prod(c.geometry.weight)
    found: dict[str, Callable[[Images], Sums]] = {
        f"patches {rows}": partial(_by_patches, rows=rows)
        for rows in pieces_within(c, max(gradient, _window_entries(c)), 2**17, 2**19)
    }
    if c.images > 1 or c.x.numel() == 0:
        return found
    # oneDNN rounds the channels of each group up to multiples of 16, in memory that it takes beside the result, some
    # five times over. A model with so few channels is small, so it gets half of it.
    outputs, channels, *kernel = c.geometry.weight
    rounded = c.geometry.groups * _aligned(outputs // c.geometry.groups) * _aligned(channels) * math.prod(kernel)
    taken = rounded if rounded == gradient else 2 * rounded
    found |= {
        f"grouped {rows}": partial(_by_groups, rows=rows) for rows in pieces_within(c, taken, 2**17, 2**18, 2**19)
    }
    if c.geometry.groups == 1 and c.geometry.stride[0] == 1 and c.geometry.weight[2] > 1:
        entries = max(gradient, _window_entries(c) // c.geometry.weight[2])
        found |= {f"rows {rows}": partial(_by_rows, rows=rows) for rows in pieces_within(c, entries, 2**18, 3 * 2**17)}
        found |= _aligned_forms(c, "aligned-rows", entries, c.geometry.weight[2])
    if c.geometry.groups == 1:
        found |= _aligned_forms(c, "aligned-patches", max(gradient, _window_entries(c)), 1)
    if c.geometry.groups == 1 and product_for(c.x) is not None and gradient > 2**14:
        found |= {
            f"{COMPILED} products {rows}": partial(_by_products, rows=rows)
            for rows in pieces_within(c, max(gradient, _window_entries(c)), 2**18, 2**20)
        }
    if gradient > 2**15:
        found["single"] = partial(_by_groups, rows=1)
    return found


def _aligned_forms(c: Images, name: str, entries: int, shifts: int) -> dict[str, Callable[[Images], Sums]]:
    """The forms `aligned-rows` and `aligned-patches`, where they can help and add at most a fifth of zeros."""
    number = math.prod(c.geometry.weight[1:]) // shifts
    if c.geometry.weight[0] % _ALIGNMENT == 0 or 5 * _aligned(number) > 6 * number:
        return {}
    pieces = pieces_within(c, entries, 3 * 2**17, 2**19)
    return {f"{name} {rows}": partial(_by_aligned_windows, rows=rows, shifts=shifts) for rows in pieces}


def _aligned(number: int) -> int:
    return -(-number // _ALIGNMENT) * _ALIGNMENT


def pieces_within(c: Images, entries: int, *budgets: int) -> list[int]:
    """How many samples to take at a time, so that what is made of them fits the cache: one number for each budget."""
    batch = len(c.x) // c.images
    return sorted({min(batch, samples_at_once(entries, c.x.device, budget)) for budget in budgets})


def _parts(c: Images, rows: int) -> Iterator[Images]:
    for start in range(0, len(c.x) // c.images, rows):
        yield c.take(slice(start, start + rows))


def _window_entries(c: Images) -> int:
    return math.prod(c.geometry.weight[1:]) * c.geometry.groups * math.prod(c.delta.shape[2:]) * c.images


def _padded(c: Images) -> Tensor:
    padding = c.geometry.padding
    return F.pad(c.x, [p for p in reversed(padding) for _ in (0, 1)]) if any(padding) else c.x


def _window_view(c: Images) -> Tensor:
    """[[x]], `(B, C, *K, *L)`, a view of the input."""
    geometry = c.geometry
    return windows_of(_padded(c), geometry.weight[2:], geometry.stride, geometry.dilation, c.delta.shape[2:])


def _windows(c: Images) -> Tensor:
    """[[x]], `(B, G, C/G · K, L)`."""
    geometry = c.geometry
    return unfold(
        _padded(c), geometry.weight[2:], geometry.stride, geometry.dilation, geometry.groups, c.delta.shape[2:]
    )


def _patches(c: Images) -> Tensor:
    delta = c.delta.reshape(len(c.delta), c.geometry.groups, c.delta.shape[1] // c.geometry.groups, -1)
    g = (delta @ _windows(c).mT).reshape(-1, *c.geometry.weight)
    return g if c.images == 1 else g.unflatten(0, (-1, c.images)).sum(1)


def _by_patches(c: Images, rows: int, norms: list[Tensor] | None = None) -> Sums:
    sums = added_up(_patch_gradients(c, rows), norms=norms)
    return sums if c.geometry.groups > 1 or c.images > 1 else _transposed(sums, c.geometry.weight)


def _patch_gradients(c: Images, rows: int) -> Iterator[Tensor]:
    """Per-sample gradients of each part; `(B, C·K, O)` where there are neither groups nor several images."""
    for part in _parts(c, rows):
        if c.geometry.groups > 1 or c.images > 1:
            yield _patches(part)
        else:  # (C·K, L) (L, O): the larger factor first is the faster order.
            yield _windows(part).squeeze(1) @ part.delta.flatten(2).mT


def _by_products(c: Images, rows: int, norms: list[Tensor] | None = None) -> Sums:
    outputs = c.geometry.weight[0]
    total = c.delta.new_zeros(math.prod(c.geometry.weight[1:]), outputs)
    squares = torch.zeros_like(total)
    for (g,) in _product_gradients(c, rows):
        total += g
        squares.addcmul_(g, g)
        if norms is not None:
            norms.append(squared_norms(g.unsqueeze(0), 0))
    return _transposed((total, squares), c.geometry.weight)


def _product_gradients(c: Images, rows: int) -> Iterator[Tensor]:
    """The gradient of one sample after the other, `(1, C·K, O)`."""
    product = product_for(c.x)
    assert product is not None
    for part in _parts(c, rows):
        for a, d in zip(_windows(part).squeeze(1), part.delta.flatten(2), strict=True):
            yield product(a, d).unsqueeze(0)


def _transposed(sums: Sums, weight: tuple[int, ...]) -> Sums:
    """Sums of `(C·K, O)` as sums of the weight's shape."""
    total, squares = (s.mT.contiguous().view(weight) for s in sums)
    return total, squares


def _by_rows(c: Images, rows: int, norms: list[Tensor] | None = None) -> Sums:
    """g_i[o, c, k₁, k₂] = Σ_{l₁ l₂} δ_i[o, l₁, l₂] x_i[c, l₁ + d k₁, l₂ + k₂]: along l₁ nothing needs to be copied."""
    outputs, channels, first, *others = c.geometry.weight
    total, squares = added_up(_row_gradients(c, rows), dim=1, norms=norms)
    order = (len(others) + 2, 1, 0, *range(2, 2 + len(others)))
    shape = (first, channels, *others, outputs)
    return total.reshape(shape).permute(order).contiguous(), squares.reshape(shape).permute(order).contiguous()


def _row_gradients(c: Images, rows: int) -> Iterator[Tensor]:
    """Per-sample gradients of each part, `(K₁, B, C · K₂, O)`."""
    first = c.geometry.weight[2]
    width = math.prod(c.delta.shape[3:])  # of a row of windows
    for part in _parts(c, rows):
        windows = _windows_along_rows(part).flatten(1, 1 + len(c.geometry.stride)).flatten(2)
        delta = part.delta.flatten(2).mT
        g = windows.new_empty(first, len(delta), windows.shape[1], delta.shape[2])
        for k in range(first):
            start = k * c.geometry.dilation[0] * width
            torch.bmm(windows[:, :, start : start + delta.shape[1]], delta, out=g[k])
        yield g


def _windows_along_rows(c: Images) -> Tensor:
    """The windows along all dimensions but the first, `(B, C, 1, *K₂, S₁, *L₂)`, a view of the input."""
    padded, geometry = _padded(c), c.geometry
    kernel, stride, dilation = ((1, *each[1:]) for each in (geometry.weight[2:], geometry.stride, geometry.dilation))
    return windows_of(padded, kernel, stride, dilation, (padded.shape[2], *c.delta.shape[3:]))


def _by_aligned_windows(c: Images, rows: int, shifts: int, norms: list[Tensor] | None = None) -> Sums:
    """As `_by_rows`, with K₁ shifts, or `_by_patches`, with one, but g_i = δ_i [[x]]_iᵀ with zeros below [[x]]_i."""
    outputs, channels, *kernel = c.geometry.weight
    copied = kernel if shifts == 1 else [1, *kernel[1:]]
    number = channels * math.prod(copied)
    total, squares = (
        s[..., :number].reshape(shifts, outputs, channels, *copied).movedim(0, 2).contiguous().view(c.geometry.weight)
        for s in added_up(_aligned_gradients(c, rows, shifts), dim=1, norms=norms)
    )
    return total, squares


def _aligned_gradients(c: Images, rows: int, shifts: int) -> Iterator[Tensor]:
    """Per-sample gradients of each part, `(shifts, B, O, C·K and some zeros)`; several shifts go along K₁."""
    number = math.prod(c.geometry.weight[1:]) // shifts
    width = math.prod(c.delta.shape[3:])  # of a row of windows
    memory = None
    for part in _parts(c, rows):
        windows, delta = _windows_along_rows(part) if shifts > 1 else _window_view(part), part.delta.flatten(2)
        if memory is None:
            memory = windows.new_zeros(len(delta), _aligned(number), windows[0].numel() // number)
        aligned = memory[: len(delta)]
        aligned[:, :number].view(windows.shape).copy_(windows)
        g = delta.new_empty(shifts, *delta.shape[:2], _aligned(number))
        for k in range(shifts):
            start = k * c.geometry.dilation[0] * width
            torch.bmm(delta, aligned[:, :, start : start + delta.shape[2]].mT, out=g[k])
        yield g


def _by_groups(c: Images, rows: int, norms: list[Tensor] | None = None) -> Sums:
    return added_up(_group_gradients(c, rows), norms=norms)


def _group_gradients(c: Images, rows: int) -> Iterator[Tensor]:
    for part in _parts(c, rows):
        yield _grouped(part)


def _grouped(c: Images) -> Tensor:
    """g_i of all samples by one grouped convolution, in which the weight's values do not matter."""
    batch, (outputs, *others) = len(c.x), c.geometry.weight
    # Through one dimension, which leaves no doubt about strides: of images of one pixel the kernels take some for
    # channels last, and fail.
    delta, x = c.delta.reshape(-1).view(1, -1, *c.delta.shape[2:]), c.x.reshape(-1).view(1, -1, *c.x.shape[2:])
    geometry = replace(c.geometry, weight=(batch * outputs, *others), groups=batch * c.geometry.groups)
    return weight_gradient(delta, x, geometry).reshape(batch, *c.geometry.weight)


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


def _rows_in_order(g: Tensor, c: Images) -> Tensor:
    """`(K₁, B, C · K₂, O)` as `(B, O, C, K₁, K₂)`."""
    outputs, channels, first, *others = c.geometry.weight
    return g.view(first, -1, channels, *others, outputs).movedim((0, -1), (3, 1))


def _patches_in_order(g: Tensor, c: Images) -> Tensor:
    """`(B, C·K, O)`, or the gradients themselves, as `(B, O, C/G, *K)`."""
    return g if c.geometry.groups > 1 or c.images > 1 else g.mT.reshape(-1, *c.geometry.weight)


def _aligned_in_order(g: Tensor, c: Images) -> Tensor:
    """`(shifts, B, O, C·K and some zeros)`, with several shifts along K₁, as `(B, O, C, *K)`."""
    outputs, channels, *kernel = c.geometry.weight
    copied = kernel if len(g) == 1 else [1, *kernel[1:]]
    of_windows = g[..., : channels * math.prod(copied)].reshape(len(g), -1, outputs, channels, *copied)
    return of_windows.movedim(0, 3).reshape(-1, *c.geometry.weight)


#: What each form forms, some samples after the other, the dimension of the samples in it, and how to put it in order.
_PIECES: dict[Callable[..., Sums], tuple[Callable[..., Iterator[Tensor]], int, Callable[[Tensor, Images], Tensor]]] = {
    _by_patches: (_patch_gradients, 0, _patches_in_order),
    _by_products: (_product_gradients, 0, _patches_in_order),
    _by_groups: (_group_gradients, 0, lambda g, c: g),
    _by_rows: (_row_gradients, 1, _rows_in_order),
    _by_aligned_windows: (_aligned_gradients, 1, _aligned_in_order),
}
