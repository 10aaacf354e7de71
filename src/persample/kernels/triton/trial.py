"""The kernels of the optimizer's step beside PyTorch's operations, on a few numbers: whether a GPU runs them right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from persample.kernels.step_kinds import StepKernel, Update
from persample.kernels.triton import launch_step

_SIZES = (1, 2500)  # more than a block

#: The settings of an update before the last two, see `launch_step.update`.
_SETTINGS = (0.25, 0.4, 0.7, 0.03, 0.02, 0.1, 0.3, 0.5)
_CLIP = 0.2


def largest_error(kind: StepKernel, device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest difference from PyTorch's operations in float64; NaN if there are NaNs.

    Args:
        kind: which kernel.
        device: where the kernel runs.
        dtype: float32 or float64.
    """
    operands = [_numbers(k, device, dtype) for k in range(5)]
    exact = [[t.double() for t in tensors] for tensors in operands]
    if kind == "draw":
        found = [[torch.empty_like(t) for t in operands[0]]]
        launch_step.draw(found[0], *operands[:3])
        expected: list[Sequence[Tensor]] = [torch._foreach_addcmul(exact[0], torch._foreach_rsqrt(exact[1]), exact[2])]
    else:
        mean, curvature, momentum, gradient, squares = operands
        found = [[torch.empty_like(t) for t in mean] for _ in range(3 if kind.has_momentum else 2)]
        settings = *_SETTINGS, _CLIP if kind.clips else float("inf"), float(kind.order_updated)
        given = mean, curvature, momentum if kind.has_momentum else None, gradient, squares
        launch_step.update(settings, *given, found[0], found[1], found[2] if kind.has_momentum else [])
        expected = list(zip(*[_updated(kind, *row) for row in zip(*exact, strict=True)], strict=True))
    pairs = [pair for f, e in zip(found, expected, strict=False) for pair in zip(f, e, strict=True)]
    return torch.stack([(f - e).abs().max() for f, e in pairs]).max().item()


def _numbers(kind: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Positive numbers, none of which is drawn: the user's random numbers stay what they are."""
    with torch.device(device):
        return [torch.linspace(0.1 + kind, 3.0, size, dtype=dtype) for size in _SIZES]


def _updated(kind: Update, m: Tensor, s: Tensor, b: Tensor, g: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    """Lines 6 and 7, see `VOGN`."""
    new_curvature, new_gradient, mass, averaged_prior, prior, prior_mean, shift, lr = _SETTINGS
    updated = s + new_curvature * (h - s)
    numerator = g + averaged_prior * (m - prior_mean)
    average = b + new_gradient * (numerator - b)
    numerator = (average / mass if kind.has_momentum else numerator) + prior * (m - prior_mean)
    change = numerator / ((updated if kind.order_updated else s) + shift)
    return m - lr * (change.clamp(-_CLIP, _CLIP) if kind.clips else change), updated, average
