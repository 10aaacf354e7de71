"""Algorithm 1 (VOGN) as pure functions of tensors: nothing here knows models, batches or optimizers.

Every function takes lists of tensors, one tensor for each parameter, and returns new ones, so that one call serves
a whole model. Symbols: μ mean, s curvature, N `data_size`, λ `prior_precision`, α `lr`, γ `decay`, ĝ the mean and
h the second moment of the per-sample gradients (of minus the log-likelihood) over the mini-batch.

Source: Khan et al., "Fast and Scalable Bayesian Deep Learning by Weight-Perturbation in Adam", ICML 2018, and the
algorithm as printed in the paper that this package reproduces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = list[Tensor] | tuple[Tensor, ...]
Order: TypeAlias = Literal["printed", "updated"]


def posterior_precision(curvature: Tensors, *, data_size: float, prior_precision: float) -> Tensors:
    """Precision of the Gaussian posterior over each weight: N s + λ."""
    precision = torch._foreach_mul(curvature, data_size)
    torch._foreach_add_(precision, prior_precision)
    return precision


def posterior_scale(curvature: Tensors, *, data_size: float, prior_precision: float) -> Tensors:
    """Standard deviation of the posterior over each weight: σ = 1 / sqrt(N s + λ)."""
    return precision_to_scale(posterior_precision(curvature, data_size=data_size, prior_precision=prior_precision))


def precision_to_scale(precision: Tensors) -> Tensors:
    """Standard deviation σ = 1 / sqrt(precision). Every σ of the package comes from here."""
    return torch._foreach_rsqrt(precision)


def update_curvature(curvature: Tensors, second_moment: Tensors, *, decay: float) -> Tensors:
    """Line 6: s_{t+1} = γ s_t + (1 − γ) h, with h = Σ g_i² / M."""
    return torch._foreach_lerp(curvature, second_moment, 1 - decay)


def update_mean(
    mean: Tensors,
    gradient: Tensors,
    curvature: Tensors,
    *,
    lr: float,
    data_size: float,
    prior_precision: float,
) -> Tensors:
    """Line 7: μ_{t+1} = μ_t − α (ĝ + λ μ_t / N) / (s + λ / N), with the s that is passed in."""
    prior = prior_precision / data_size
    numerator = torch._foreach_add(gradient, mean, alpha=prior)
    denominator = torch._foreach_add(curvature, prior)
    return torch._foreach_addcdiv(mean, numerator, denominator, value=-lr)


def vogn_update(
    mean: Tensors,
    curvature: Tensors,
    gradient: Tensors,
    second_moment: Tensors,
    *,
    lr: float,
    data_size: float,
    prior_precision: float,
    decay: float,
    order: Order,
) -> tuple[Tensors, Tensors]:
    """Lines 6 and 7 together.

    Args:
        mean: μ_t.
        curvature: s_t.
        gradient: ĝ = Σ g_i / M, or its running mean (`average_gradient`).
        second_moment: h = Σ g_i² / M.
        lr: α.
        data_size: N.
        prior_precision: λ.
        decay: γ.
        order: "printed" divides line 7 by s_t, as the algorithm is printed; "updated" by s_{t+1}, as most other
            implementations do.

    Returns:
        (μ_{t+1}, s_{t+1}).
    """
    new_curvature = update_curvature(curvature, second_moment, decay=decay)
    divisor = curvature if order == "printed" else new_curvature
    new_mean = update_mean(mean, gradient, divisor, lr=lr, data_size=data_size, prior_precision=prior_precision)
    return new_mean, new_curvature


def average_gradient(
    average: Tensors, mass: Sequence[float], gradient: Tensors, *, momentum: float
) -> tuple[Tensors, list[float], Tensors]:
    """Running mean of the gradient, and the same without its bias towards the zero that it starts from.

        m_{t+1} = β m_t + (1 − β) ĝ        c_{t+1} = β c_t + (1 − β)        m̂ = m_{t+1} / c_{t+1}

    From c_0 = 0 and with a constant β, c_t is the 1 − β^t of Adam; kept as a number of its own it is also right when
    a scheduler changes β.

    Args:
        average: m_t.
        mass: c_t of each parameter.
        gradient: ĝ.
        momentum: β.

    Returns:
        (m_{t+1}, c_{t+1}, m̂).
    """
    new_average = torch._foreach_lerp(average, gradient, 1 - momentum)
    new_mass = [momentum * c + (1 - momentum) for c in mass]
    return new_average, new_mass, torch._foreach_div(new_average, new_mass)
