"""The products of convolutions and linear layers by the compiled kernels, which keep g_i, or its sums, in registers."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from persample.kernels.autotune import choose
from persample.kernels.compiled import INT, POINTER, find_kernel
from persample.kernels.convolution import key_of, per_sample_forms
from persample.kernels.convolution_forms import pieces_within
from persample.kernels.images import Geometry, Images, checked
from persample.kernels.library import LIBRARY, ON_ANY_DEVICE
from persample.kernels.linear import check as check_linear
from persample.kernels.linear import norms_from_products
from persample.kernels.operands import NAMES
from persample.kernels.outer import check as check_outer
from persample.kernels.pieces import Sums

_SUMS_OF_THREADS = 2**25  # bytes at most of the sums that threads take for themselves
_WORTH_A_THREAD = 2**18  # multiplications


def _product(c: Images, sums: bool, norms: bool) -> tuple[Tensor, ...] | None:
    """Return Σ_i g_i and Σ_i g_i², and ‖g_i‖², as wanted; None where PyTorch's own operations are to compute."""
    dtype = NAMES.get(c.x.dtype)
    if dtype is None or c.delta.dtype != c.x.dtype or math.prod(c.geometry.weight) == 0 or not _fits(c):
        return None
    kernel = find_kernel(f"persample_products_{dtype}", *[POINTER] * 6, INT)
    if kernel is None:
        return None
    weight, batch = c.geometry.weight, len(c.x) // c.images
    results = [c.x.new_empty(weight), c.x.new_empty(weight)] if sums else []
    addresses: list[int | None] = [t.data_ptr() for t in results] or [None, None]
    if norms:
        results.append(c.x.new_zeros(batch))
    addresses.append(results[-1].data_ptr() if norms else None)
    kernel(_layer(c, batch), c.x.data_ptr(), c.delta.data_ptr(), *addresses, _threads(c, batch))
    return tuple(results)


def _fits(c: Images) -> bool:
    """Whether the last window lies inside the padded input."""
    g = c.geometry
    sizes = zip(c.x.shape[2:], c.delta.shape[2:], g.weight[2:], g.stride, g.padding, g.dilation, strict=True)
    return all(n == 0 or (n - 1) * s + d * (k - 1) < size + 2 * p for size, n, k, s, p, d in sizes)


def _layer(c: Images, batch: int) -> Any:
    """`Layer` in `csrc/products.cpp`."""
    g, x, delta = c.geometry, c.x, c.delta
    numbers = [batch, c.images, g.groups, g.weight[1], g.weight[0] // g.groups]
    for values, missing in ((x.shape[2:], 1), (delta.shape[2:], 1), (g.weight[2:], 1)):
        numbers += _three(values, missing)
    for values, missing in ((g.stride, 1), (g.padding, 0), (g.dilation, 1)):
        numbers += _three(values, missing)
    for t in (x, delta):
        numbers += [*t.stride()[:2], *_three(t.stride()[2:], 0)]
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _three(values: Sequence[int], missing: int) -> list[int]:
    return [missing] * (3 - len(values)) + list(values)


def _threads(c: Images, batch: int) -> int:
    """How many threads take samples, by the sizes alone: their sums are added up in a fixed order."""
    weight = c.geometry.weight
    work = c.delta.numel() * math.prod(weight[1:]) // _WORTH_A_THREAD
    room = _SUMS_OF_THREADS // (2 * math.prod(weight) * c.x.element_size())
    return max(1, min(torch.get_num_threads(), batch, work, room))


_ONE = (1,)


def _of_linear(x: Tensor, delta: Tensor) -> Images:
    return Images(delta.mT, x.mT, Geometry((delta.shape[2], x.shape[2], 1), _ONE, (0,), _ONE, 1))


def _of_outer(delta: Tensor, a: Tensor) -> Images:
    weight = (delta.shape[1] * delta.shape[2], a.shape[2], 1)
    return Images(delta.flatten(1, 2), a.flatten(1, 2), Geometry(weight, _ONE, (0,), _ONE, delta.shape[1]))


def _one_position(x: Tensor, delta: Tensor) -> Sums | None:
    """Return Σ_i g_i and Σ_i g_i², `(G, O, I)`, of g_i = δ_i a_iᵀ, for a `(B, G, I)` and δ `(B, G, O)`; or None."""
    dtype = NAMES.get(x.dtype)
    if dtype is None or delta.dtype != x.dtype:
        return None
    kernel = find_kernel(f"persample_outer_{dtype}", *[POINTER] * 5, INT)
    if kernel is None:
        return None
    batch, groups, inputs = x.shape
    shape = groups, delta.shape[2], inputs
    total, squares = x.new_empty(shape), x.new_empty(shape)
    sizes = batch, groups, delta.shape[2], inputs, *x.stride(), *delta.stride()
    threads = max(1, min(torch.get_num_threads(), batch * math.prod(shape) // _WORTH_A_THREAD))
    addresses = x.data_ptr(), delta.data_ptr(), total.data_ptr(), squares.data_ptr()
    kernel((ctypes.c_int64 * len(sizes))(*sizes), *addresses, threads)
    return total, squares


def _convolution_moments(*arguments: Any) -> Any:
    return _product(checked(*arguments), True, False) or ON_ANY_DEVICE["convolution_moments"](*arguments)


def _convolution_squared_norms(*arguments: Any) -> Any:
    found = _product(checked(*arguments), False, True)
    return found[0] if found else ON_ANY_DEVICE["convolution_squared_norms"](*arguments)


def _convolution_moments_and_norms(*arguments: Any) -> Any:
    return _product(checked(*arguments), True, True) or ON_ANY_DEVICE["convolution_moments_and_norms"](*arguments)


def _convolution_per_sample(*arguments: Any) -> Tensor:
    c = checked(*arguments)
    return choose(key_of("gradients of a convolution", c), lambda: gradient_forms(c), c)[0]


def gradient_forms(c: Images) -> dict[str, Callable[[Images], tuple[Tensor]]]:
    """Forms of g_i, with those in which the kernel takes each sample as a group: the sums over one sample are g_i."""
    found = per_sample_forms(c)
    if c.geometry.groups == c.images == 1 and c.x.numel() > 0:
        for rows in pieces_within(c, c.x[0].numel() + c.delta[0].numel(), 2**17, 2**19):
            found[f"kernel {rows}"] = partial(_samples_as_groups, rows=rows)
    return found


def _samples_as_groups(c: Images, rows: int) -> tuple[Tensor]:
    gradients = c.delta.new_empty(len(c.x), *c.geometry.weight)
    for x, delta, g in zip(c.x.split(rows), c.delta.split(rows), gradients.split(rows), strict=True):
        weight = (len(x) * c.geometry.weight[0], *c.geometry.weight[1:])
        geometry = replace(c.geometry, weight=weight, groups=len(x))
        found = _product(Images(delta.flatten(0, 1).unsqueeze(0), x.flatten(0, 1).unsqueeze(0), geometry), True, False)
        if found is None:
            raise RuntimeError("The kernel does not serve this convolution.")
        g.copy_(found[0].view_as(g))
    return (gradients,)


def _linear_moments(x: Tensor, delta: Tensor) -> Any:
    check_linear(x, delta)
    found = _one_position(x, delta) if x.shape[1] == 1 else _product(_of_linear(x, delta), True, False)
    return _in_shape(found, (delta.shape[2], x.shape[2])) or ON_ANY_DEVICE["linear_moments"](x, delta)


def _linear_squared_norms(x: Tensor, delta: Tensor) -> Any:
    check_linear(x, delta)
    shorter = norms_from_products(x.shape[1], delta.shape[2], x.shape[2])
    found = None if shorter else _product(_of_linear(x, delta), False, True)
    return found[0] if found else ON_ANY_DEVICE["linear_squared_norms"](x, delta)


def _linear_moments_and_norms(x: Tensor, delta: Tensor) -> Any:
    check_linear(x, delta)
    outputs, inputs = delta.shape[2], x.shape[2]
    found: tuple[Tensor, ...] | None = None
    if x.shape[1] == 1:
        found = _one_position(x, delta)
    elif not norms_from_products(x.shape[1], outputs, inputs):
        found = _product(_of_linear(x, delta), True, True)
    sums = _in_shape(found, (outputs, inputs))
    if found is None or sums is None:
        return ON_ANY_DEVICE["linear_moments_and_norms"](x, delta)
    return *sums, *(found[2:] or (ON_ANY_DEVICE["linear_squared_norms"](x, delta),))


def _outer_moments(delta: Tensor, a: Tensor) -> Any:
    check_outer(delta, a)
    one = a.shape[3] == 1
    found = _one_position(a.squeeze(3), delta.squeeze(3)) if one else _product(_of_outer(delta, a), True, False)
    shape = delta.shape[1], delta.shape[2], a.shape[2]
    return _in_shape(found, shape) or ON_ANY_DEVICE["outer_moments"](delta, a)


def _in_shape(found: tuple[Tensor, ...] | None, shape: Sequence[int]) -> Sums | None:
    return None if found is None else (found[0].view(shape), found[1].view(shape))


for implementation in (
    *(_convolution_moments, _convolution_squared_norms, _convolution_moments_and_norms, _convolution_per_sample),
    *(_linear_moments, _linear_squared_norms, _linear_moments_and_norms, _outer_moments),
):
    LIBRARY.impl(implementation.__name__.removeprefix("_"), implementation, "CPU")
