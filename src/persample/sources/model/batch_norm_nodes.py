"""Passing batch norm's backward kernel gradients in a memory layout that it reads correctly.

On a CPU, PyTorch (2.13, 2.14) takes an image for one in channels last if it is one but for the strides of dimensions
of size 1, and the kernel of the backward pass takes the same image for one in channels first: it reads the wrong
entries, and the gradients of input, scale and shift are wrong. So it is for a batch of one image whose result is read
as tokens, for images of one row or column, and for any batch behind instance norm, which lays the channels of all
samples side by side in one image. Here the gradients that arrive at such nodes are copied to where they are read right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from persample.sources.model.autograd_graph import nodes_behind

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def read_right(losses: Iterable[Tensor]) -> None:
    """Pass every batch norm in the graph of `losses` its gradient in a layout that its kernel reads correctly."""
    with torch._C.DisableTorchFunction():
        for node in {node for loss in losses for node in nodes_behind(loss)}:
            if node.name() == "NativeBatchNormBackward0" and _may_be_misread(node._input_metadata[0].shape):
                node.register_prehook(_laid_out_for(_saved_input(node)))


def _may_be_misread(shape: torch.Size) -> bool:
    """Whether a dimension other than the channels has size 1, so that its stride is meaningless."""
    return len(shape) in _CHANNELS_LAST and 1 in (shape[0], *shape[2:])


def _saved_input(node: Any) -> Tensor | None:
    """Return the input that autograd saved, or None if saved-tensor hooks replaced it."""
    saved = getattr(node, "_raw_saved_input", None)
    if saved is None or getattr(saved, "unpack_hook", saved) is not None:
        return None
    found: Tensor = saved.data
    return found


def _laid_out_for(x: Tensor | None) -> Callable[[tuple[Tensor | None, ...]], tuple[Tensor | None, ...] | None]:
    layout = None if x is None else _layout(x)

    def copied(deltas: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
        delta, *others = deltas
        if delta is None or (layout is not None and _layout(delta) is not None):
            return None
        if layout is not None:
            return delta.clone(memory_format=layout), *others
        # Every other entry of a tensor twice as large is in no layout, so that the kernel goes by its strides.
        return delta.new_empty((*delta.shape, 2))[..., 0].copy_(delta), *others

    return copied


def _layout(image: Tensor) -> torch.memory_format | None:
    """Return the memory format of `image`, `preserve_format` if it has none; None if it may be misread."""
    if image.is_contiguous():
        return torch.contiguous_format
    last = _CHANNELS_LAST[image.dim()]
    if not image.is_contiguous(memory_format=last):
        return torch.preserve_format
    in_order = torch.empty(image.shape, device="meta", memory_format=last)
    return last if image.stride() == in_order.stride() else None
