"""Recurrent layers on a GPU, which cuDNN runs with random numbers of its own and not in every mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from persample.sources.model.modules import modules_of


def repeatable(model: nn.Module) -> AbstractContextManager[None]:
    """Return the context in which recurrent layers of `model` run alike each time, and have a backward pass.

    cuDNN keeps the random numbers of the dropout between its layers to itself, so a pass cannot be repeated, and has no
    backward pass in eval mode. PyTorch's own kernels, which take its place here, draw from PyTorch's generator.
    """
    return (
        without_cudnn() if torch.cuda.is_initialized() and any(map(_beyond_cudnn, modules_of(model))) else nullcontext()
    )


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Switch cuDNN off inside the context.

    `torch.backends.cudnn.flags` would set more than that: the precision of all products on GPUs.
    """
    before = torch._C._get_cudnn_enabled()
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_cudnn_enabled(before)


def _beyond_cudnn(module: nn.Module) -> bool:
    return isinstance(module, nn.RNNBase) and (not module.training or module.dropout > 0)
