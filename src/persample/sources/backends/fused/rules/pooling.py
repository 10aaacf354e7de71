"""Max pooling, which has no parameters, by whichever of PyTorch's kernels is the fastest for the shape.

The kernel for images whose channels lie side by side uses the processor's vectors, the ordinary one does not: often the
copy into that order pays. Where there are few channels, those of several images are put side by side. Values, indices
and gradients are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from persample.sources.backends.fused.autotune import Key, choose

_ENOUGH_CHANNELS = 64


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
        forms = partial(_forms, x)
        key = Key(("max pool", x.shape[1], str(settings), x.dtype), (len(x), *x.shape[2:]))
        values, indices = choose(key, forms, x, settings)
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
    kernel, stride, dilation = _pair(kernel), _pair(stride) or _pair(kernel), _pair(dilation)
    return dilation == (1, 1) and all(s >= k for s, k in zip(stride, kernel, strict=True))


def _pair(value: Any) -> tuple[int, ...]:
    """The setting of both dimensions; nothing if it is left out."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * 2 if len(values) == 1 else values


def _forms(x: Tensor) -> dict[str, Callable[[Tensor, tuple[Any, ...]], tuple[Tensor, Tensor]]]:
    images = _images_side_by_side(*x.shape[:2])
    forms: dict[str, Callable[[Tensor, tuple[Any, ...]], tuple[Tensor, Tensor]]] = {}
    if images > 1:
        forms["images side by side"] = partial(_channels_last, images=images)
    return forms | {"channels last": partial(_channels_last, images=1), "as it lies": _as_it_lies}


def _images_side_by_side(batch: int, channels: int) -> int:
    """How many images, which divide the batch evenly, have channels enough for the processor's vectors."""
    return next((n for n in range(1, batch + 1) if batch % n == 0 and n * channels >= _ENOUGH_CHANNELS), max(batch, 1))


def _as_it_lies(x: Tensor, settings: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    values, indices = torch.ops.aten.max_pool2d_with_indices.default(x, *settings)
    return values, indices


def _channels_last(x: Tensor, settings: tuple[Any, ...], images: int) -> tuple[Tensor, Tensor]:
    together = x.view(len(x) // images, images * x.shape[1], *x.shape[2:])
    # The copy has no name, so that its memory is free for those of the results.
    values, indices = _as_it_lies(together.contiguous(memory_format=torch.channels_last), settings)
    shape = (*x.shape[:2], *values.shape[2:])
    return values.contiguous().view(shape), indices.contiguous().view(shape)


#: Operations without parameters that can be had faster, with the same result.
FASTER: Mapping[Any, Callable[..., Any]] = {F.max_pool2d: max_pool2d, torch.max_pool2d: max_pool2d}
