"""Recurrent layers on a GPU, which cuDNN runs with random numbers of its own and not in every mode."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.backends import cudnn

from persample.sources.model.modules import modules_of


def repeatable(model: nn.Module) -> AbstractContextManager[None]:
    """Return the context in which recurrent layers of `model` run alike each time, and have a backward pass.

    cuDNN keeps the random numbers of the dropout between its layers to itself, so a pass cannot be repeated, and has no
    backward pass in eval mode. PyTorch's own kernels, which take its place here, draw from PyTorch's generator.
    """
    if not (torch.cuda.is_initialized() and cudnn.enabled and any(map(_beyond_cudnn, modules_of(model)))):
        return nullcontext()
    flags: AbstractContextManager[None] = cudnn.flags(
        enabled=False, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=cudnn.allow_tf32
    )
    return flags


def _beyond_cudnn(module: nn.Module) -> bool:
    return isinstance(module, nn.RNNBase) and (not module.training or module.dropout > 0)
