"""Training diagnostics: effective learning rates, signal-to-noise ratios and widths of the posterior, by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from persample.warn import warn

# The posterior is looked at after so many steps, and whenever their number has doubled.
FIRST_LOOK = 128

# Above this share of the initial value in the curvature, the data have not been heard yet.
MOST_OF_INITIAL = 0.9

# As many times 1 / (1 − γ) steps leave a twentieth of the initial value, which has to be high for a safe first step.
LONG_ENOUGH = 3

# σ over |μ|, both as root mean squares over all weights: above this the draws are little but noise.
WIDEST = 10.0

# σ over |μ| of the median weight: below this, or below the rounding of the weights, the draws are all alike.
NARROWEST = 1e-5


class StuckCurvatureWarning(UserWarning):
    """The curvature of a layer is still dominated by its initial value, although it should have decayed."""


class PosteriorWidthWarning(UserWarning):
    """The posterior is so narrow that all draws are equal, or so wide that they are mostly noise."""


@dataclass(frozen=True)
class LayerDiagnostics:
    """Diagnostics of one parameter of the model; medians over its weights.

    Attributes:
        effective_lr: by how much a step moves a weight whose gradient is 1.
        signal_to_noise: the absolute value of μ over σ.
        scale: σ.
        smallest_scale: the smallest σ of a weight.
        largest_scale: the largest.
    """

    effective_lr: float
    signal_to_noise: float
    scale: float
    smallest_scale: float
    largest_scale: float


@dataclass(frozen=True)
class Diagnostics:
    """Training diagnostics, see `VariationalOptimizer.diagnostics`.

    Attributes:
        steps: how many steps were taken.
        skipped_steps: how many were skipped because they would not have been finite.
        layers: by the names of the parameters.
    """

    steps: int
    skipped_steps: int
    layers: Mapping[str, LayerDiagnostics]


def layer_diagnostics(mean: Tensor, scale: Tensor, effective_lr: Tensor) -> LayerDiagnostics:
    """Summarise one parameter; NaN if it is empty.

    Args:
        mean: μ of each weight.
        scale: σ.
        effective_lr: by how much a step moves it for a gradient of 1.
    """
    if not mean.numel():
        return LayerDiagnostics(*[math.nan] * 5)
    return LayerDiagnostics(
        effective_lr=effective_lr.median().item(),
        signal_to_noise=(mean.abs() / scale).median().item(),
        scale=scale.median().item(),
        smallest_scale=scale.min().item(),
        largest_scale=scale.max().item(),
    )


def warn_of_width(mean: list[Tensor], scale: list[Tensor]) -> bool:
    """Warn with `PosteriorWidthWarning` if the posterior over the whole model has collapsed or exploded.

    Args:
        mean: the parameters, in their own dtype.
        scale: σ of each weight.

    Returns:
        Whether it warned.
    """
    noise = math.sqrt(sum(s.square().sum().item() for s in scale))
    signal = math.sqrt(sum(m.to(s.dtype).square().sum().item() for m, s in zip(mean, scale, strict=True)))
    if noise > WIDEST * signal:
        warn(
            f"The posterior is too wide: over all weights σ is {noise / signal if signal else math.inf:.3g} times as "
            "large as the mean, so the draws are mostly noise. Raise prior_precision or the initial precision "
            "(hess_init), or lower the temperature.",
            PosteriorWidthWarning,
        )
        return True
    narrow = sum(
        int((s < max(NARROWEST, torch.finfo(m.dtype).eps) * m.abs()).sum()) for m, s in zip(mean, scale, strict=True)
    )
    if narrow > 0.5 * sum(m.numel() for m in mean):
        warn(
            "The posterior is too narrow: for most weights σ is below the resolution of the model's dtype at the "
            f"mean, or below {NARROWEST:g} of the mean, so all draws are equal. Lower prior_precision or hess_init, "
            "or keep the model in float32.",
            PosteriorWidthWarning,
        )
        return True
    return False


def warn_of_stuck_curvature(curvature: Mapping[str, Tensor], initial: float, decay: float, steps: list[int]) -> bool:
    """Warn with `StuckCurvatureWarning` if a layer's curvature is mostly the remainder of its initial value.

    Of s_t a part γ^t s_0 comes from the start, and the rest from the data. Before 3 / (1 − γ) steps this is unknown.

    Args:
        curvature: s_t by the names of the parameters.
        initial: s_0.
        decay: γ; 1 keeps the curvature on purpose.
        steps: t of each parameter.

    Returns:
        Whether it warned.
    """
    stuck = [
        name
        for (name, s), t in zip(curvature.items(), steps, strict=True)
        if decay < 1
        and t * (1 - decay) >= LONG_ENOUGH
        and s.numel()
        and initial * decay**t > MOST_OF_INITIAL * s.median().item()
    ]
    if stuck:
        warn(
            f"After {max(steps)} steps the curvature of {stuck[0]!r} ({len(stuck)} of {len(curvature)} parameters) is "
            "still mostly the remainder of hess_init, so its posterior is too narrow and its steps are too short. "
            "Lower hess_init, or check that the layer gets a gradient.",
            StuckCurvatureWarning,
        )
    return bool(stuck)
