"""Max pooling, by whichever of PyTorch's kernels is the fastest for the shape.

The kernel for images whose channels lie side by side uses the processor's vectors, the ordinary one does not: often the
copy into that order pays. Where there are few channels, those of several images are put side by side. Values, indices
and gradients are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from persample.kernels.autotune import Key, choose
from persample.kernels.library import operator

_ENOUGH_CHANNELS = 64


def _fake(x: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    values, indices = _as_it_lies(x, settings)
    return _row_major(values), _row_major(indices)


@operator(
    "max_pool2d(Tensor x, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool ceil_mode)"
    " -> (Tensor, Tensor)",
    _fake,
)
def max_pool2d(x: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    """Return the values and indices of `torch.ops.aten.max_pool2d_with_indices`, for a contiguous x on a CPU."""
    forms = partial(_forms, x)
    key = Key(("max pool", x.shape[1], str(settings), x.dtype), (len(x), *x.shape[2:]))
    values, indices = choose(key, forms, x, settings)
    return _row_major(values), _row_major(indices)


def _row_major(t: Tensor) -> Tensor:
    """Return `t` in row-major order, with the strides of that also along dimensions of one entry.

    PyTorch's kernels go by those, too: images of one pixel may count as ones whose channels lie side by side.
    """
    return t.contiguous().view(-1).view(t.shape)


def _forms(x: Tensor) -> dict[str, Callable[[Tensor, tuple[Any, ...]], tuple[Tensor, Tensor]]]:
    images = _images_side_by_side(*x.shape[:2])
    forms: dict[str, Callable[[Tensor, tuple[Any, ...]], tuple[Tensor, Tensor]]] = {}
    if images > 1:
        forms["images side by side"] = partial(_channels_last, images=images)
    return forms | {"channels last": partial(_channels_last, images=1), "as it lies": _as_it_lies}


def _images_side_by_side(batch: int, channels: int) -> int:
    """How many images to fold so that their channels fill the processor's vectors; divides the batch."""
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
