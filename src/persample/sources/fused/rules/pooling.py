"""Max pooling, which has no parameters, by whichever of PyTorch's kernels is the fastest for the shape.

The kernel for images whose channels lie side by side uses the processor's vectors, the ordinary one does not: often the
copy into that order pays. Values, indices and gradients are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from persample.sources.fused.choice import choose


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
    settings = (kernel_size, [] if stride is None else stride, padding, dilation, ceil_mode)
    result: Tensor = _MaxPool.apply(input, settings)  # type: ignore[no-untyped-call]
    return result


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: tuple[Any, ...]) -> Tensor:
        values, indices = choose(("max pool", x.shape, str(settings), x.dtype), _forms, x, settings)
        ctx.save_for_backward(x, indices)
        ctx.settings = settings
        return values

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None]:
        x, indices = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            gradient: Tensor = torch.ops.aten.max_pool2d_with_indices_backward.default(
                delta.contiguous(), x, *ctx.settings, indices
            )
        return gradient, None


def _forms() -> dict[str, Callable[[Tensor, tuple[Any, ...]], tuple[Tensor, Tensor]]]:
    return {"as it lies": _as_it_lies, "channels last": _channels_last}


def _as_it_lies(x: Tensor, settings: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    values, indices = torch.ops.aten.max_pool2d_with_indices.default(x, *settings)
    return values, indices


def _channels_last(x: Tensor, settings: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    values, indices = _as_it_lies(x.contiguous(memory_format=torch.channels_last), settings)
    return values.contiguous(), indices.contiguous()
