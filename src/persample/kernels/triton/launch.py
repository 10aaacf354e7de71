"""Sums and sums of squares of products of single samples, by the kernels of `products`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from persample.kernels.triton import products
from persample.kernels.triton.tuning import Launch, Shape, launch_for, launches, parts_of

Sums = tuple[Tensor, Tensor]

_MOST_ENTRIES = 2**31 - 1  # of an image: offsets within it have 32 bits


def linear_moments(x: Tensor, delta: Tensor, *, launch: Launch | None = None, fixed: bool = False) -> Sums:
    """Return Σ_i g_i and Σ_i g_i², each `(O, K)`, of g_i = Σ_l δ_il x_ilᵀ.

    Args:
        x: shape `(B, L, K)`.
        delta: shape `(B, L, O)`.
        launch: how the kernel is launched; else the fastest way, found by trial.
        fixed: whether the likely way is taken without trial.
    """
    _require_small_images(x, delta)
    batch, positions, columns = x.shape
    outputs = delta.shape[2]
    tf32 = allows_tf32()
    kind = ("linear", tf32, x.stride(2) == 1, delta.stride(2) == 1)
    shape = Shape(kind, batch, outputs, columns, positions)
    if positions == 1:
        shape = Shape(("one position", *kind[1:]), 1, outputs, columns, batch)

    def run(launch: Launch) -> Sums:
        if positions == 1:
            return _one_position(x.squeeze(1), delta.squeeze(1), launch)
        strides = (delta.stride(0), delta.stride(2), delta.stride(1)), (x.stride(0), x.stride(2), 0, x.stride(1), 0, 0)
        sums = _moments(delta, x, shape, strides, (1, positions, columns, 1, 1), 1, launch)
        return sums[0].view(outputs, columns), sums[1].view(outputs, columns)

    return run(launch or launch_for(shape, launches(shape, tf32), x.device, run, fixed))


def convolution_moments(
    x: Tensor,
    delta: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    images: int = 1,
    *,
    launch: Launch | None = None,
    fixed: bool = False,
) -> Sums:
    """Return Σ_i g_i and Σ_i g_i², each `(O, C/G, *kernel_size)`, of g_i = Σ_l δ_il [[x]]_ilᵀ.

    The windows [[x]] are read from the (padded) input where they are; nothing is unfolded in memory.

    Args:
        x: shape `(B·R, C, *S)` with one or two dimensions in S.
        delta: shape `(B·R, O, *L)`.
        kernel_size: that of the convolution, as the next three.
        stride: one number for each dimension.
        padding: zeros before and after each dimension.
        dilation: the distance between the entries of a window.
        groups: G.
        images: R, how many images a sample has; their gradients are added up.
        launch: how the kernel is launched; else the fastest way, found by trial.
        fixed: whether the likely way is taken without trial.
    """
    _require_small_images(x, delta)
    weight = (delta.shape[1], x.shape[1] // groups, *kernel_size)
    if len(kernel_size) == 1:  # as an image of one row
        x, delta = x.unsqueeze(2), delta.unsqueeze(2)
        kernel_size, stride, padding, dilation = (1, *kernel_size), (1, *stride), (0, *padding), (1, *dilation)
    channels, outputs = weight[1], weight[0] // groups
    delta = delta.contiguous()
    tf32 = allows_tf32()
    geometry = tuple(map(tuple, (kernel_size, stride, padding, dilation)))
    kind = ("convolution", tf32, geometry, images)
    columns = channels * math.prod(kernel_size)
    shape = Shape(kind, len(x) // images, outputs, columns, math.prod(delta.shape[2:]), groups)

    def run(launch: Launch) -> Sums:
        padded = _padded(x, padding, launch.channels_last)
        to_row, to_pixel = padded.stride(2), padded.stride(3)
        x_strides = (
            *(padded.stride(0), padded.stride(1)),
            *(stride[0] * to_row, stride[1] * to_pixel),
            *(dilation[0] * to_row, dilation[1] * to_pixel),
        )
        delta_strides = (delta.stride(0), delta.stride(1), 1)
        sizes = (images, delta.shape[3], channels, kernel_size[1], math.prod(kernel_size))
        sums = _moments(delta, padded, shape, (delta_strides, x_strides), sizes, groups, launch)
        return sums[0].view(weight), sums[1].view(weight)

    return run(launch or launch_for(shape, launches(shape, tf32, channels), x.device, run, fixed))


def _require_small_images(x: Tensor, delta: Tensor) -> None:
    if max(x[0].numel(), delta[0].numel()) > _MOST_ENTRIES:
        raise RuntimeError("an image of a sample has more entries than 32 bits can count")


def _moments(
    delta: Tensor,
    x: Tensor,
    shape: Shape,
    strides: tuple[tuple[int, ...], tuple[int, ...]],
    sizes: tuple[int, int, int, int, int],
    groups: int,
    launch: Launch,
) -> Sums:
    """Launch `products.moments`; return both sums, `(G · O, K)`."""
    images, row_length, channels, window_width, window_size = sizes
    parts = parts_of(shape, launch, _processors(x.device))
    sums = x.new_empty(2, parts, groups * shape.outputs, shape.columns)
    # Positions that follow each other in memory, and windows of one entry, need no division.
    in_rows = shape.positions > row_length and strides[1][2] != row_length * strides[1][3]
    products.moments[(_tiles(shape, launch), parts, groups)](
        delta,
        x,
        sums[0],
        sums[1],
        shape.samples,
        images,
        shape.positions,
        shape.outputs,
        shape.columns,
        -(-shape.samples // parts),
        row_length,
        channels,
        window_width,
        window_size,
        *strides[0],
        *strides[1],
        windows=window_size > 1 or in_rows,
        one_block=images == 1 and shape.positions <= launch.block_l,
        **launch.options(),
    )
    return _added_up(sums)


def _one_position(x: Tensor, delta: Tensor, launch: Launch) -> Sums:
    """Launch `products.one_position`; return both sums, `(O, K)`."""
    (batch, columns), outputs = x.shape, delta.shape[1]
    blocks = -(-batch // launch.block_l)
    shape = Shape((), blocks, outputs, columns, launch.block_l)
    parts = parts_of(shape, launch, _processors(x.device))
    sums = x.new_empty(2, parts, outputs, columns)
    products.one_position[(_tiles(shape, launch), parts)](
        delta,
        x,
        sums[0],
        sums[1],
        batch,
        outputs,
        columns,
        -(-blocks // parts) * launch.block_l,
        *delta.stride(),
        *x.stride(),
        **launch.options(),
    )
    return _added_up(sums)


def _added_up(sums: Tensor) -> Sums:
    """Return both sums from `(2, parts, O, K)`; the order of the parts is always the same."""
    whole = sums.squeeze(1) if sums.shape[1] == 1 else sums.sum(1)
    return whole[0], whole[1]


def _tiles(shape: Shape, launch: Launch) -> int:
    return -(-shape.outputs // launch.block_o) * -(-shape.columns // launch.block_k)


def _padded(x: Tensor, padding: Sequence[int], channels_last: bool) -> Tensor:
    """The input between zeros; with `channels_last` the channels of a pixel lie side by side."""
    sides = [side for side in reversed(padding) for _ in (0, 1)]
    if not channels_last:
        return F.pad(x, sides) if any(padding) else x
    if not any(padding):
        return x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    above, left = padding
    memory = x.new_zeros(batch, height + 2 * above, width + 2 * left, channels).permute(0, 3, 1, 2)
    memory[:, :, above : above + height, left : left + width] = x
    return memory


def _processors(device: torch.device) -> int:
    """How many multiprocessors the GPU has; a few where there is none, so that tests have several parts."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def allows_tf32() -> bool:
    """Whether the user allows PyTorch products of TF32.

    Those of convolutions are allowed by PyTorch's default, without being asked, so the setting of matrix products
    counts for both.
    """
    products = torch.backends.cuda.matmul
    if not hasattr(products, "fp32_precision"):  # the word for it since PyTorch 2.9, which refuses a mixture of both
        return bool(products.allow_tf32)
    said = str(products.fp32_precision)
    return (said if said != "none" else str(torch.backends.fp32_precision)) == "tf32"  # type: ignore[attr-defined]
