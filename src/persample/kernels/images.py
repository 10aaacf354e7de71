"""A convolution whose weight has gradients of single samples, and the windows of its input."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor

from persample.kernels.unfolding import unfold, windows_of


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
        """Return some of the samples."""
        start, stop, _ = samples.indices(len(self.x) // self.images)
        part = slice(start * self.images, stop * self.images)
        return replace(self, delta=self.delta[part], x=self.x[part])

    def in_parts(self, rows: int) -> Iterator[Self]:
        """Yield so many samples at a time."""
        for start in range(0, len(self.x) // self.images, rows):
            yield self.take(slice(start, start + rows))

    def per_sample(self) -> Tensor:
        """Return g_i for each sample, shape `(B, O, C/G, *K)`."""
        return gradients(self)


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


def arguments(c: Images) -> tuple[Any, ...]:
    """What the operators are called with."""
    g = c.geometry
    return c.x, c.delta, g.weight[2:], g.stride, g.padding, g.dilation, g.groups, c.images


def window_entries(c: Images) -> int:
    """Return how many numbers the windows of a sample have."""
    return math.prod(c.geometry.weight[1:]) * c.geometry.groups * math.prod(c.delta.shape[2:]) * c.images


def padded(c: Images) -> Tensor:
    """Return the input between zeros."""
    padding = c.geometry.padding
    return F.pad(c.x, [p for p in reversed(padding) for _ in (0, 1)]) if any(padding) else c.x


def window_view(c: Images) -> Tensor:
    """[[x]], `(B, C, *K, *L)`, a view of the input."""
    geometry = c.geometry
    return windows_of(padded(c), geometry.weight[2:], geometry.stride, geometry.dilation, c.delta.shape[2:])


def windows(c: Images) -> Tensor:
    """[[x]], `(B, G, C/G · K, L)`."""
    geometry = c.geometry
    return unfold(
        padded(c), geometry.weight[2:], geometry.stride, geometry.dilation, geometry.groups, c.delta.shape[2:]
    )


def gradients(c: Images) -> Tensor:
    """Return g_i from the windows of the input, shape `(B, O, C/G, *K)`."""
    delta = c.delta.reshape(len(c.delta), c.geometry.groups, c.delta.shape[1] // c.geometry.groups, -1)
    g = (delta @ windows(c).mT).reshape(-1, *c.geometry.weight)
    return g if c.images == 1 else g.unflatten(0, (-1, c.images)).sum(1)
