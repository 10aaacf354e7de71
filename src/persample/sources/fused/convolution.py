"""Per-sample weight gradients of a convolution, in whichever exact form is the fastest for its shape.

All forms compute g_i = Σ_l δ_il [[x]]_ilᵀ for a few samples and add up g_i and g_i². They differ in what the processor
is good at:

- `patches`: the input's windows are copied out, then one batched matrix product (few channels, many pixels);
- `products`: the same windows, one matrix product of oneDNN for each sample (many channels);
- `grouped`: the weight gradient of a grouped convolution, in which each sample is a group;
- `single`: the weight gradient of a convolution, for one sample after the other (large weights).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from persample.errors import UnsupportedModelError
from persample.sources.fused.choice import choose
from persample.sources.fused.onednn import product_for
from persample.sources.unfolding import unfold

Sums = tuple[Tensor, Tensor]


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
class Convolution:
    """g_i = Σ_l δ_il [[x]]_ilᵀ: the weight of a convolution.

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

    def rows(self, rows: slice) -> Convolution:
        start, stop, _ = rows.indices(len(self.x) // self.images)
        part = slice(start * self.images, stop * self.images)
        return Convolution(self.delta[part], self.x[part], self.geometry, self.images)

    def per_sample(self) -> Tensor:
        return _patches(self)

    def sums(self) -> Sums:
        key = (tuple(self.x.shape), tuple(self.delta.shape), self.geometry, self.images, self.x.dtype, self.x.device)
        return choose(("convolution", key), forms(self))

    def printed_second_moment_sum(self) -> Tensor:
        raise UnsupportedModelError("The printed formula is a curvature of backend 'hooks' only.")


def forms(convolution: Convolution) -> dict[str, Callable[[], Sums]]:
    """The forms worth trying, the one that suits most shapes first."""
    geometry, batch = convolution.geometry, len(convolution.x) // convolution.images
    # Windows or gradients of so many samples are made at a time; what fits the cache is quickly used up.
    largest = max(math.prod(geometry.weight), _window_entries(convolution))
    pieces = sorted({min(batch, max(1, budget // max(1, largest))) for budget in (2**17, 2**19, 2**21)})
    found: dict[str, Callable[[], Sums]] = {
        f"patches {rows}": partial(added_up, _patches, convolution, rows) for rows in pieces
    }
    if convolution.images == 1 and convolution.x.numel() > 0:
        found |= {
            f"grouped {rows}": partial(added_up, _grouped, convolution, rows)
            for rows in (16, 64, batch)
            if rows <= batch
        }
        if product_for(convolution.x) is not None and geometry.groups == 1:
            found |= {f"products {rows}": partial(_products, convolution, rows) for rows in pieces[:2]}
        if math.prod(geometry.weight) > 2**15:
            found["single"] = partial(added_up, _single, convolution, 1)
    return found


def added_up(form: Callable[[Convolution], Tensor], convolution: Convolution, rows: int) -> Sums:
    """Return Σ_i g_i and Σ_i g_i², `rows` samples at a time."""
    total = convolution.delta.new_zeros(convolution.geometry.weight)
    squares = torch.zeros_like(total)
    for start in range(0, len(convolution.x) // convolution.images, rows):
        g = form(convolution.rows(slice(start, start + rows)))
        if len(g) == 1:
            total += g[0]
            squares.addcmul_(g[0], g[0])
        else:
            total += g.sum(0)
            squares += g.square_().sum(0)
    return total, squares


def _window_entries(convolution: Convolution) -> int:
    geometry = convolution.geometry
    return (
        math.prod(geometry.weight[1:]) * geometry.groups * math.prod(convolution.delta.shape[2:]) * convolution.images
    )


def _windows(c: Convolution) -> Tensor:
    """[[x]], `(B, G, C/G · K, L)`."""
    geometry = c.geometry
    padded = F.pad(c.x, [p for p in reversed(geometry.padding) for _ in (0, 1)]) if any(geometry.padding) else c.x
    kernel = geometry.weight[2:]
    return unfold(padded, kernel, geometry.stride, geometry.dilation, geometry.groups, c.delta.shape[2:])


def _patches(c: Convolution) -> Tensor:
    delta = c.delta.reshape(len(c.delta), c.geometry.groups, c.delta.shape[1] // c.geometry.groups, -1)
    g = (delta @ _windows(c).mT).reshape(-1, *c.geometry.weight)
    return g if c.images == 1 else g.unflatten(0, (-1, c.images)).sum(1)


def _products(c: Convolution, rows: int) -> Sums:
    product = product_for(c.x)
    assert product is not None
    outputs = c.geometry.weight[0]
    total = c.delta.new_zeros(math.prod(c.geometry.weight[1:]), outputs)
    squares = torch.zeros_like(total)
    for start in range(0, len(c.x), rows):
        piece = c.rows(slice(start, start + rows))
        for a, d in zip(_windows(piece).squeeze(1), piece.delta.flatten(2), strict=True):
            g = product(a, d)  # (C·K, L) (L, O): the larger factor first is the faster order
            total += g
            squares.addcmul_(g, g)
    return total.mT.reshape(c.geometry.weight), squares.mT.reshape(c.geometry.weight)


def _grouped(c: Convolution) -> Tensor:
    batch, weight = len(c.x), c.geometry.weight
    delta, x = c.delta.reshape(1, -1, *c.delta.shape[2:]), c.x.reshape(1, -1, *c.x.shape[2:])
    g = _weight_gradient(delta, x, (batch * weight[0], *weight[1:]), c.geometry, batch * c.geometry.groups)
    return g.reshape(batch, *weight)


def _single(c: Convolution) -> Tensor:
    return _weight_gradient(c.delta, c.x, c.geometry.weight, c.geometry, c.geometry.groups).unsqueeze(0)


def _weight_gradient(delta: Tensor, x: Tensor, shape: tuple[int, ...], geometry: Geometry, groups: int) -> Tensor:
    """Σ_i g_i of an ordinary convolution with a weight of `shape`, whose values do not matter."""
    gradient: Tensor = torch.ops.aten.convolution_backward(
        delta,
        x,
        x.new_zeros(1).expand(shape),
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        [0] * len(geometry.stride),
        groups,
        [False, True, False],
    )[1]
    return gradient
