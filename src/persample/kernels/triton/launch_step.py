"""Draws and updates of the optimizer, by the kernels of `step`."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from persample.kernels.triton import step

_BLOCK, _WARPS = 1024, 4
_MOST_PROGRAMS = 1024  # of a tensor: several for each multiprocessor, whatever the tensor's size
_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def draw(
    weights: Sequence[Tensor], mean: Sequence[Tensor], precision: Sequence[Tensor], noise: Sequence[Tensor]
) -> None:
    """Write w = μ + ε / sqrt(precision) to `weights`."""
    _launch(step.draw, (), weights, mean, precision, noise)


def update(
    settings: Sequence[float],
    mean: Sequence[Tensor],
    curvature: Sequence[Tensor],
    momentum: Sequence[Tensor] | None,
    gradient: Sequence[Tensor],
    second_moment: Sequence[Tensor],
    new_mean: Sequence[Tensor],
    new_curvature: Sequence[Tensor],
    new_momentum: Sequence[Tensor],
) -> None:
    """Write μ_{t+1}, s_{t+1} and m_{t+1} to the last three.

    Args:
        settings: 1 − γ, 1 − β, the mass of the momentum, the prior before and after the average, m₀, the shift of the
            divisor, α, ξ (infinite: does not clip), and whether the divisor has s_{t+1}; as in `csrc/step.cpp`.
        mean: μ_t, as the others see `persample.kernels.step.update`.
        curvature: s_t.
        momentum: m_t, or None.
        gradient: ĝ.
        second_moment: h.
        new_mean: of the same shapes, as the next two.
        new_curvature: for s_{t+1}.
        new_momentum: for m_{t+1}; empty if there is none.
    """
    *numbers, clip, order_updated = settings
    operands = [mean, curvature, gradient, second_moment, new_mean, new_curvature]
    operands += [] if momentum is None else [momentum, new_momentum]
    kinds = {"has_momentum": momentum is not None, "clips": clip < float("inf"), "order_updated": bool(order_updated)}
    _launch(step.update, (*numbers, clip), *operands, **kinds)


def _launch(kernel: Any, settings: Sequence[float], *operands: Sequence[Tensor], **kinds: bool) -> None:
    """Launch a kernel for all tensors at once."""
    first = operands[0]
    sizes = [t.numel() for t in first]
    programs = min(_MOST_PROGRAMS, triton.cdiv(max(sizes, default=0), _BLOCK))
    if not programs:
        return
    numbers = [*struct.unpack(f"{len(settings)}q", struct.pack(f"{len(settings)}d", *settings)), *sizes]
    numbers += [t.data_ptr() for tensors in operands for t in tensors]
    table = _on_device(numbers, first[0].device)
    options: dict[str, Any] = {"dtype": _TYPES[first[0].dtype], "block": _BLOCK, "num_warps": _WARPS}
    with torch.cuda.device_of(first[0]):
        kernel[(programs, len(first))](table, len(first), **kinds, **options)


def _on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Return a tensor of integers, for which the processor need not wait for the GPU."""
    table = torch.tensor(numbers, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)
