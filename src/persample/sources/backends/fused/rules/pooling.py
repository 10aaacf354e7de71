"""Max pooling, which has no parameters, by whichever of PyTorch's kernels is the fastest for the shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from persample.kernels import pooling


def max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """`F.max_pool2d`."""
    if input.device.type != "cpu" or input.dim() != 4 or not input.is_contiguous() or return_indices:
        pool: Any = F.max_pool2d
        return pool(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    settings = (_pair(kernel_size), [] if stride is None else _pair(stride), _pair(padding), _pair(dilation), ceil_mode)
    result: Tensor = _MaxPool.apply(input, settings)  # type: ignore[no-untyped-call]
    return result


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: tuple[Any, ...]) -> Tensor:
        values, indices = pooling.max_pool2d(x, *settings)
        ctx.apart, ctx.shape, ctx.settings = _windows_are_apart(settings), x.shape, settings
        ctx.save_for_backward(indices, *(() if ctx.apart else (x,)))
        return values

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None]:
        indices, *x = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            if ctx.apart:
                gradient = delta.new_zeros(ctx.shape)
                gradient.flatten(2).scatter_(2, indices.flatten(2), delta.flatten(2))
            else:
                gradient = torch.ops.aten.max_pool2d_with_indices_backward.default(
                    delta.contiguous(), *x, *ctx.settings, indices
                )
        return gradient, None


def _windows_are_apart(settings: tuple[Any, ...]) -> bool:
    """Whether no two windows share a pixel."""
    kernel, stride, _, dilation, _ = settings
    return dilation == (1, 1) and all(s >= k for s, k in zip(stride or kernel, kernel, strict=True))


def _pair(value: Any) -> tuple[int, ...]:
    """The setting of both dimensions."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * 2 if len(values) == 1 else values


#: Operations without parameters that can be had faster, with the same result.
FASTER: Mapping[Any, Callable[..., Any]] = {F.max_pool2d: max_pool2d, torch.max_pool2d: max_pool2d}
