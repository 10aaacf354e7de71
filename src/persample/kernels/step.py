"""The optimizer's step, in one pass over memory each: drawing weights, updating the posterior, looking at it."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from persample.kernels import gpu
from persample.kernels.compiled import INT, POINTER, SIZE, find_kernel
from persample.kernels.library import LIBRARY, ON_ANY_DEVICE, operator
from persample.kernels.operands import addresses, kernel_serves, plain_dtype, refuse_other_shapes, sizes
from persample.kernels.step_kinds import Update

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


def _draw_on_gpu(weights: Tensors, mean: Tensors, precision: Tensors, noise: Tensors) -> None:
    operands = weights, mean, precision, noise
    kernels = gpu.step_kernels("draw", *operands)
    if kernels is None:
        ON_ANY_DEVICE["draw_"](*operands)
        return
    refuse_other_shapes(weights, mean=mean, precision=precision, noise=noise)
    kernels.draw(*operands)


LIBRARY.impl("draw_", _draw_on_cpu, "CPU")
LIBRARY.impl("draw_", _draw_on_gpu, "CUDA")


def update(
    mean: Tensors,
    curvature: Tensors,
    momentum: Tensors | None,
    gradient: Tensors,
    second_moment: Tensors,
    *,
    decay: float,
    beta: float,
    mass: float,
    averaged_prior: float,
    prior: float,
    prior_mean: float,
    shift: float,
    lr: float,
    max_update: float | None,
    order_updated: bool,
) -> tuple[Tensors, Tensors, Tensors] | None:
    """Return μ_{t+1}, s_{t+1} and m_{t+1} of `VOGN`; None where no kernel serves. Changes nothing that is passed in.

    Rounded as `persample.vogn.core` does.

    Args:
        mean: μ_t.
        curvature: s_t.
        momentum: m_t; None is none, then m_{t+1} is an empty list.
        gradient: ĝ.
        second_moment: h.
        decay: γ.
        beta: β.
        mass: what m_{t+1} is divided by.
        averaged_prior: by which μ_t − m₀ is added to ĝ before the average;
        prior: and afterwards.
        prior_mean: m₀.
        shift: what is added to the curvature in the divisor.
        lr: α.
        max_update: ξ; None does not clip.
        order_updated: whether the divisor has s_{t+1}, else s_t.
    """
    clip = math.inf if max_update is None else max_update
    settings = 1 - decay, 1 - beta, mass, averaged_prior, prior, prior_mean, shift, lr, clip, float(order_updated)
    given = [mean, curvature, gradient, second_moment, *([] if momentum is None else [momentum])]
    kernel = _updating_on_cpu(*given) or _updating_on_gpu(settings, *given)
    if kernel is None:
        return None
    refuse_other_shapes(mean, curvature=curvature, gradient=gradient, second_moment=second_moment)
    refuse_other_shapes(mean, momentum=mean if momentum is None else momentum)
    new_mean, new_curvature = ([torch.empty_like(m) for m in mean] for _ in range(2))
    new_momentum = [] if momentum is None else [torch.empty_like(m) for m in mean]
    kernel(settings, mean, curvature, momentum, gradient, second_moment, new_mean, new_curvature, new_momentum)
    return new_mean, new_curvature, new_momentum


def _updating_on_cpu(*given: Tensors) -> Callable[..., None] | None:
    kernel = find_kernel(f"persample_update_{plain_dtype(*given)}", *[POINTER] * 10, SIZE, INT)
    if kernel is None or not kernel_serves(*given):
        return None

    def run(settings: tuple[float, ...], *operands: Tensors | None) -> None:
        mean = given[0]
        of_all = [addresses(tensors) if tensors else None for tensors in operands]
        numbers = (ctypes.c_double * len(settings))(*settings)
        kernel(numbers, *of_all, sizes(mean), len(mean), torch.get_num_threads())

    return run


def _updating_on_gpu(settings: tuple[float, ...], *given: Tensors) -> Callable[..., None] | None:
    if torch.compiler.is_compiling():
        return None
    *_, clip, order_updated = settings
    kernels = gpu.step_kernels(Update(len(given) == 5, clip < math.inf, order_updated != 0), *given)
    return None if kernels is None else kernels.update


def all_finite(tensors: Tensors) -> bool | None:
    """Return whether no entry is infinite or not a number; None where no kernel serves."""
    dtype_name = plain_dtype(tensors)
    kernel = find_kernel(f"persample_all_finite_{dtype_name}", POINTER, POINTER, SIZE, POINTER)
    if kernel is None or not kernel_serves(tensors):
        return None
    result = ctypes.c_int(0)
    kernel(addresses(tensors), sizes(tensors), len(tensors), ctypes.addressof(result))
    return bool(result.value)
