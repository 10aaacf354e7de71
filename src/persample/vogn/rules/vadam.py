"""Vadam: Adam with perturbed weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from persample.vogn import core
from persample.vogn.core import Tensors
from persample.vogn.first_argument import Trained
from persample.vogn.observations import Observed
from persample.vogn.optimizer import VariationalOptimizer
from persample.vogn.param_group import Part
from persample.vogn.saving.state_schema import FINITE, MASS, NOT_NEGATIVE, Kinds
from persample.vogn.settings import SharedSettings


class Vadam(VariationalOptimizer):
    """Variational Adam: a Gaussian posterior from ordinary gradients of batches, at perturbed weights.

        w ~ N(μ_t, 1 / (N s_t + λ))
        ĝ = the gradient of the batch's mean loss at w
        m_{t+1} = β₁ m_t + (1 − β₁) (ĝ + λ μ_t / N)        m̂ = m_{t+1} / (1 − β₁^{t+1})
        s_{t+1} = β₂ s_t + (1 − β₂) ĝ²                      ŝ = s_{t+1} / (1 − β₂^{t+1})
        μ_{t+1} = μ_t − α m̂ / (sqrt(ŝ) + λ / N)

    Source: Khan et al., "Fast and Scalable Bayesian Deep Learning by Weight-Perturbation in Adam", ICML 2018, figure 1.
    The square of a batch's gradient takes the place of the mean square of the samples' gradients: cheaper, and the
    posterior becomes too wide as batches grow. Of several draws, ĝ and ĝ² are averaged, each by itself.

    With temperature τ and prior mean m₀ the prior's terms are τ λ (μ − m₀) / N and τ λ / N, and σ² = τ / (N s + τ λ),
    as for `VOGN`.

    Args:
        model: the network. Needing no gradients of single samples, it may mix samples (BatchNorm).
        loss_fn: as for `VOGN`.
        lr: α.
        betas: β₁ and β₂.
        hess_init: s_0. The initial posterior has precision N s_0 + λ.
        shared: `data_size` and the other settings of all rules (`prior_precision`, `prior_mean`, `prior`,
            `temperature`, `temperature_start`, `temperature_steps`, `max_grad_norm`, `augmentation`,
            `mc_samples`, `loss_reduction`, `generator`, `params`), as for `VOGN`; by default
            `prior_precision` and `temperature` are 1.

    Raises:
        OptionError: an argument is out of its range, or a parameter is not the model's, frozen, or given twice.
    """

    rule: ClassVar[str] = "Vadam"
    state_kinds: ClassVar[Kinds] = {
        "average": FINITE,
        "average_mass": MASS,
        "curvature": NOT_NEGATIVE,
        "curvature_mass": MASS,
    }
    keeps_draws_apart: ClassVar[bool] = True

    def __init__(
        self,
        model: Trained,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        hess_init: float = 0.0,
        **shared: Unpack[SharedSettings],
    ) -> None:
        settings = {
            "lr": lr,
            "betas": betas,
            "hess_init": hess_init,
        }
        super().__init__(model, loss_fn, settings, **shared)

    def _new_state(self, param: Tensor, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "average": torch.zeros_like(param),
            "average_mass": 0.0,
            "curvature": torch.full_like(param, settings["hess_init"]),
            "curvature_mass": 0.0,
        }

    def _part_precision(self, part: Part) -> Tensors:
        return core.posterior_precision(part.state("curvature"), **part.objective)

    def _effective_lr(self, part: Part) -> Tensors:
        masses = [mass or 1.0 for mass in part.state("curvature_mass")]
        root = torch._foreach_sqrt(torch._foreach_div(part.state("curvature"), masses))
        return torch._foreach_mul(torch._foreach_reciprocal(core.divisor(root, **part.objective)), part.settings["lr"])

    def _update(
        self, part: Part, gradient: list[Tensor], observed: list[Observed]
    ) -> tuple[Tensors, list[dict[str, Any]]]:
        beta1, beta2 = part.settings["betas"]
        average, average_mass, corrected_average = core.running_average(
            part.state("average"),
            part.state("average_mass"),
            part.with_prior(gradient),
            decay=beta1,
        )
        curvature, curvature_mass, corrected_curvature = core.running_average(
            part.state("curvature"), part.state("curvature_mass"), _mean_squares(part, observed), decay=beta2
        )
        denominator = core.divisor(torch._foreach_sqrt(corrected_curvature), **part.objective)
        mean = core.update_mean(part.mean, corrected_average, denominator, lr=part.settings["lr"])
        keys = ("average", "average_mass", "curvature", "curvature_mass")
        rows = zip(average, average_mass, curvature, curvature_mass, strict=True)
        return mean, [dict(zip(keys, row, strict=True)) for row in rows]


def _mean_squares(part: Part, observed: list[Observed]) -> Tensors:
    """The squared gradient of each draw, averaged over draws, weighted by their numbers of samples."""
    total = sum(draw.moments.batch_size for draw in observed)
    squares = [torch.zeros_like(m) for m in part.mean]
    for draw in observed:
        gradient = part.of(draw.moments.mean)
        torch._foreach_addcmul_(squares, gradient, gradient, value=draw.moments.batch_size / total)
    return squares
