"""Unfolding: the windows that a convolution sees, as columns of a matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def windows_of(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], positions: Sequence[int]
) -> Tensor:
    """Return the windows of the padded `x`, `(B, C, *S)`, as a view of it, `(B, C, *K, *L)`.

    Args:
        x: what the windows are cut from.
        kernel: size of a window along each dimension, K.
        stride: distance between windows.
        dilation: distance between the entries of a window.
        positions: how many windows along each dimension, L. The last ones are left away where the output padding of a
            transposed convolution leaves room for more.
    """
    dimensions = len(positions)
    windows = x
    for d in range(dimensions):
        span = dilation[d] * (kernel[d] - 1) + 1
        windows = windows.unfold(2 + d, span, stride[d])[..., :: dilation[d]].narrow(2 + d, 0, positions[d])
    return windows.permute(0, 1, *range(2 + dimensions, 2 + 2 * dimensions), *range(2, 2 + dimensions))


def unfold(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    positions: Sequence[int],
) -> Tensor:
    """Return a copy of the windows of the padded `x`, `(B, C, *S)`, as `(B, G, C/G · K, L)`.

    Args:
        x: what the windows are cut from.
        kernel: size of a window along each dimension; K is their product.
        stride: distance between windows.
        dilation: distance between the entries of a window.
        groups: G.
        positions: how many windows along each dimension; L is their product. See `windows_of`.
    """
    batch, channels = x.shape[:2]
    rows = channels // groups * math.prod(kernel)
    return windows_of(x, kernel, stride, dilation, positions).reshape(batch, groups, rows, math.prod(positions))


def padding_pairs(
    padding: str | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]
) -> list[tuple[int, int]]:
    """Return how much a convolution pads before and after each dimension.

    Args:
        padding: `"valid"`, `"same"`, or one number for each dimension.
        kernel: size of a window along each dimension.
        dilation: distance between the entries of a window.
    """
    if padding == "valid":
        return [(0, 0)] * len(kernel)
    if padding == "same":
        # An odd total puts the additional entry at the end.
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(int(p), int(p)) for p in padding]
