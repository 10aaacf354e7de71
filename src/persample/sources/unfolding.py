"""Unfolding: the windows that a convolution sees, as columns of a matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def unfold(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    positions: Sequence[int],
) -> Tensor:
    """Return the windows of the padded `x`, `(B, C, *S)`, as `(B, G, C/G · K, L)`.

    Args:
        x: what the windows are cut from.
        kernel: size of a window along each dimension; K is their product.
        stride: distance between windows.
        dilation: distance between the entries of a window.
        groups: G.
        positions: how many windows along each dimension; L is their product. The last ones are left away where the
            output padding of a transposed convolution leaves room for more.
    """
    dimensions = len(positions)
    windows = x
    for d in range(dimensions):
        span = dilation[d] * (kernel[d] - 1) + 1
        windows = windows.unfold(2 + d, span, stride[d])[..., :: dilation[d]].narrow(2 + d, 0, positions[d])
    batch, channels = x.shape[:2]
    kernel_first = [0, 1, *range(2 + dimensions, 2 + 2 * dimensions), *range(2, 2 + dimensions)]
    rows = channels // groups * math.prod(kernel)
    return windows.permute(kernel_first).reshape(batch, groups, rows, math.prod(positions))
