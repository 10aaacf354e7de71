"""The optimizer's step: draws of the weights, in one pass over memory."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from persample.kernels.compiled import INT, POINTER, SIZE, find_kernel
from persample.kernels.library import LIBRARY, ON_ANY_DEVICE, operator
from persample.kernels.operands import addresses, plain_dtype, refuse_other_shapes, sizes

Tensors: TypeAlias = list[Tensor] | tuple[Tensor, ...]


def _fake_draw(weights: Tensors, mean: Tensors, precision: Tensors, noise: Tensors) -> None:
    refuse_other_shapes(weights, mean=mean, precision=precision, noise=noise)


@operator("draw_(Tensor(a!)[] weights, Tensor[] mean, Tensor[] precision, Tensor[] noise) -> ()", _fake_draw)
def draw_(weights: Tensors, mean: Tensors, precision: Tensors, noise: Tensors) -> None:
    """Write w = μ + ε / sqrt(precision) to `weights`; the tensors of one place in the lists have one shape."""
    refuse_other_shapes(weights, mean=mean, precision=precision, noise=noise)
    if weights:
        torch._foreach_copy_(weights, torch._foreach_addcmul(mean, torch._foreach_rsqrt(precision), noise))


def _draw_on_cpu(weights: Tensors, mean: Tensors, precision: Tensors, noise: Tensors) -> None:
    operands = weights, mean, precision, noise
    dtype_name = plain_dtype(*operands)
    kernel = find_kernel(f"persample_draw_{dtype_name}", POINTER, POINTER, POINTER, POINTER, POINTER, SIZE, INT)
    if kernel is None:
        ON_ANY_DEVICE["draw_"](*operands)
        return
    refuse_other_shapes(weights, mean=mean, precision=precision, noise=noise)
    kernel(*map(addresses, operands), sizes(weights), len(weights), torch.get_num_threads())


LIBRARY.impl("draw_", _draw_on_cpu, "CPU")
