"""The VOGN rule as pure functions of tensors, independent of models, batches and optimizers.

Every function takes lists of tensors, one tensor for each parameter, and returns new ones, so that one call serves
a whole model. Symbols: μ mean, s curvature, N `data_size`, λ `prior_precision`, m₀ `prior_mean`, α `lr`, γ `decay`,
d `damping`, τ `temperature`, ĝ the mean and h the second moment of the per-sample gradients (of minus the
log-likelihood) over the mini-batch. λ and m₀ are numbers, or one tensor for each parameter.

Sources: the lines are those of Algorithm 1 as printed in the paper that this package reproduces (Jain and Khan), whose
derivation is in Khan et al., "Fast and Scalable Bayesian Deep Learning by Weight-Perturbation in Adam", ICML 2018.
Damping and temperature are those of Osawa et al., "Practical Deep Learning with Bayesian Principles", NeurIPS 2019.
With temperature τ the posterior is the one that minimises Σ_i E[loss_i] + τ KL(posterior ‖ prior).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = list[Tensor] | tuple[Tensor, ...]
Order: TypeAlias = Literal["printed", "updated"]


def posterior_precision(
    curvature: Tensors,
    *,
    data_size: float,
    prior_precision: float | Tensors,
    damping: float = 0.0,
    temperature: float = 1.0,
) -> Tensors:
    """Precision of the Gaussian posterior over each weight: N (s + d) / τ + λ, which is N s + λ as printed."""
    weight = data_size / temperature
    precision = torch._foreach_mul(curvature, weight)
    torch._foreach_add_(precision, prior_precision)
    if damping:
        torch._foreach_add_(precision, weight * damping)
    return precision


def precision_to_scale(precision: Tensors) -> Tensors:
    """Standard deviation of the posterior over each weight: σ = 1 / sqrt(precision). Every σ comes from here."""
    return torch._foreach_rsqrt(precision)


def update_curvature(curvature: Tensors, second_moment: Tensors, *, decay: float) -> Tensors:
    """Line 6: s_{t+1} = γ s_t + (1 − γ) h, with h = Σ g_i² / M."""
    return torch._foreach_lerp(curvature, second_moment, 1 - decay)


def update_hessian(hessian: Tensors, estimate: Tensors, with_decay: Tensors, *, decay: float) -> Tensors:
    """IVON's h_{t+1} = β₂ h + (1 − β₂) ĥ + ½ (1 − β₂)² (h − ĥ)² / (h + δ), which keeps h + δ > 0.

    Source: Shen et al., ICML 2024, Algorithm 1, line 5; Lin et al., "Handling the Positive-Definite Constraint in the
    Bayesian Learning Rule", ICML 2020. With r = (1 − β₂) (ĥ − h) / (h + δ) it is h_{t+1} + δ = (h + δ) (1 + r + r²/2).

    Args:
        hessian: h, the running mean of the Hessian.
        estimate: ĥ.
        with_decay: h + δ.
        decay: β₂.
    """
    change = torch._foreach_mul(torch._foreach_sub(estimate, hessian), 1 - decay)
    new = torch._foreach_add(hessian, change)
    torch._foreach_addcdiv_(new, torch._foreach_mul(change, change), with_decay, value=0.5)
    return new


def add_prior(
    gradient: Tensors,
    mean: Tensors,
    *,
    data_size: float,
    prior_precision: float | Tensors,
    prior_mean: float | Tensors = 0.0,
    temperature: float = 1.0,
) -> Tensors:
    """Numerator of line 7: ĝ + τ λ (μ − m₀) / N, the gradient of the whole objective by the mean, over N."""
    weight = temperature / data_size
    if isinstance(prior_mean, list | tuple) or prior_mean:
        mean = torch._foreach_sub(mean, prior_mean)
    if isinstance(prior_precision, list | tuple):
        return torch._foreach_addcmul(gradient, prior_precision, mean, value=weight)
    return torch._foreach_add(gradient, mean, alpha=weight * prior_precision)


def divisor(
    curvature: Tensors,
    *,
    data_size: float,
    prior_precision: float | Tensors,
    damping: float = 0.0,
    temperature: float = 1.0,
) -> Tensors:
    """Denominator of line 7: s + d + τ λ / N, the precision of the posterior times τ / N."""
    weight = temperature / data_size
    if isinstance(prior_precision, list | tuple):
        total = torch._foreach_add(curvature, prior_precision, alpha=weight)
        if damping:
            torch._foreach_add_(total, damping)
        return total
    return torch._foreach_add(curvature, damping + weight * prior_precision)


def update_mean(
    mean: Tensors, numerator: Tensors, denominator: Tensors, *, lr: float, max_update: float | None = None
) -> Tensors:
    """Line 7: μ_{t+1} = μ_t − α u with u = `numerator` / `denominator` (`add_prior`, `divisor`).

    With `max_update` ξ the entries of u are clipped to [−ξ, ξ], as in Shen et al., "Variational Learning is Effective
    for Large Deep Networks", ICML 2024.
    """
    if max_update is None:
        return torch._foreach_addcdiv(mean, numerator, denominator, value=-lr)
    update = torch._foreach_div(numerator, denominator)
    torch._foreach_clamp_max_(update, max_update)
    torch._foreach_clamp_min_(update, -max_update)
    return torch._foreach_add(mean, update, alpha=-lr)


def running_average(
    average: Tensors, mass: Sequence[float], value: Tensors, *, decay: float, bias_correction: bool = True
) -> tuple[Tensors, list[float], Tensors]:
    """Running average of `value` that starts at 0, raw and bias-corrected.

        m_{t+1} = β m_t + (1 − β) v        c_{t+1} = β c_t + (1 − β)        m̂ = m_{t+1} / c_{t+1}

    From c_0 = 0 and with a constant β, c_t is the 1 − β^t of Adam (Kingma and Ba, 2015); kept as a number of its own
    it is also right when a scheduler changes β.

    Args:
        average: m_t.
        mass: c_t of each parameter.
        value: v, the new value.
        decay: β.
        bias_correction: whether to divide; otherwise m̂ = m_{t+1}.

    Returns:
        (m_{t+1}, c_{t+1}, m̂).
    """
    new_average = torch._foreach_lerp(average, value, 1 - decay)
    new_mass = [decay * c + (1 - decay) for c in mass]
    masses = set(new_mass)
    if not bias_correction or masses == {1.0}:
        return new_average, new_mass, new_average
    # One number for all is far cheaper than a list of numbers.
    corrected = torch._foreach_div(new_average, new_mass[0] if len(masses) == 1 else new_mass)
    return new_average, new_mass, corrected


def clip_norm(gradient: Tensors, max_norm: float) -> Tensors:
    """Gradient clipping: ĝ · min(1, c / (‖ĝ‖ + 1e-6)), ‖ĝ‖ over all tensors, as in `torch.nn.utils.clip_grad_norm_`."""
    norms = torch._foreach_norm(gradient)
    norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return [g * factor.to(g) for g in gradient]
