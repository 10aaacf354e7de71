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

import torch
import torch.nn.functional as F
from torch import Tensor

from persample.errors import UnsupportedModelError
from persample.sources.fused.choice import choose
from persample.sources.unfolding import unfold


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
        if len(self.x) == 0:
            return self.x.new_zeros((0, *self.geometry.weight))
        return _patches(self.delta, self.x, self.geometry, self.images)

    def sums(self) -> tuple[Tensor, Tensor]:
        if self.images > 1 or self.x.numel() == 0:
            return added_up(_patches, self.delta, self.x, self.geometry, self.images, _piece(self.geometry))
        key = (tuple(self.x.shape), tuple(self.delta.shape), self.geometry, self.x.dtype, self.x.device)
        forms = {name: _bound(form, rows, self) for name, form, rows in candidates(self)}
        return choose(("convolution", key), forms)

    def printed_second_moment_sum(self) -> Tensor:
        raise UnsupportedModelError("The printed formula is a curvature of backend 'hooks' only.")


Form = Callable[[Tensor, Tensor, Geometry, int], Tensor]


def candidates(convolution: Convolution) -> list[tuple[str, Form, int]]:
    """The forms worth trying, the one that suits most shapes first, with how many samples they take at a time."""
    geometry = convolution.geometry
    batch = len(convolution.x)
    piece = _piece(geometry)
    found: list[tuple[str, Form, int]] = [("patches", _patches, min(piece, 16))]
    found += [(f"grouped {rows}", _grouped, rows) for rows in (16, 64, batch) if rows <= batch]
    if _onednn_linear(convolution.x) is not None and geometry.groups == 1:
        found.append(("products", _products, min(piece, 8)))
    found.append(("patches 64", _patches, 64))
    if math.prod(geometry.weight) > 2**15:
        found.append(("single", _single, 1))
    return found


def added_up(form: Form, delta: Tensor, x: Tensor, geometry: Geometry, images: int, rows: int) -> tuple[Tensor, Tensor]:
    """Return Σ_i g_i and Σ_i g_i², `rows` samples at a time."""
    total = delta.new_zeros(geometry.weight)
    squares = torch.zeros_like(total)
    step = max(1, rows) * images
    for d, part in zip(delta.split(step), x.split(step), strict=True):
        g = form(d, part, geometry, images)
        if len(g) == 1:
            total += g[0]
            squares.addcmul_(g[0], g[0])
        else:
            total += g.sum(0)
            squares += g.square_().sum(0)
    return total, squares


def _bound(form: Form, rows: int, c: Convolution) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: added_up(form, c.delta, c.x, c.geometry, c.images, rows)


def _piece(geometry: Geometry) -> int:
    """How many samples' gradients fit the cache."""
    return max(1, 2**19 // math.prod(geometry.weight))


def _windows(x: Tensor, delta: Tensor, geometry: Geometry) -> Tensor:
    """[[x]], `(B, G, C/G · K, L)`."""
    padded = F.pad(x, [p for p in reversed(geometry.padding) for _ in (0, 1)]) if any(geometry.padding) else x
    kernel = geometry.weight[2:]
    return unfold(padded, kernel, geometry.stride, geometry.dilation, geometry.groups, delta.shape[2:])


def _patches(delta: Tensor, x: Tensor, geometry: Geometry, images: int) -> Tensor:
    windows = _windows(x, delta, geometry)
    delta = delta.reshape(len(delta), geometry.groups, delta.shape[1] // geometry.groups, -1)
    g = (delta @ windows.mT).reshape(-1, *geometry.weight)
    return g if images == 1 else g.unflatten(0, (-1, images)).sum(1)


def _products(delta: Tensor, x: Tensor, geometry: Geometry, images: int) -> Tensor:
    windows = _windows(x, delta, geometry).squeeze(1)
    delta = delta.flatten(2)
    product = _onednn_linear(x)
    assert product is not None
    # (C·K, L) (L, O): the larger factor first is the faster order.
    g = torch.stack([product(a, d) for a, d in zip(windows, delta, strict=True)])
    return g.mT.reshape(-1, *geometry.weight)


def _grouped(delta: Tensor, x: Tensor, geometry: Geometry, images: int) -> Tensor:
    batch = len(x)
    weight = x.new_zeros(1).expand(batch * geometry.weight[0], *geometry.weight[1:])
    return _weight_gradient(
        delta.reshape(1, -1, *delta.shape[2:]),
        x.reshape(1, -1, *x.shape[2:]),
        weight,
        geometry,
        batch * geometry.groups,
    ).reshape(batch, *geometry.weight)


def _single(delta: Tensor, x: Tensor, geometry: Geometry, images: int) -> Tensor:
    weight = x.new_zeros(1).expand(geometry.weight)
    return _weight_gradient(delta, x, weight, geometry, geometry.groups).unsqueeze(0)


def _weight_gradient(delta: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, groups: int) -> Tensor:
    gradient: Tensor = torch.ops.aten.convolution_backward(
        delta,
        x,
        weight,
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


def _onednn_linear(x: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The x wᵀ of oneDNN for float32 on a CPU, faster than the BLAS on some processors; None where it is not there."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return None
    operation = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if operation is None:
        return None
    return lambda a, b: operation(a, b, None, "none", [], "")
