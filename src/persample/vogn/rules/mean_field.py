"""Mean-field variational inference by reparameterised weights."""

from __future__ import annotations

import math
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


class MeanFieldVI(VariationalOptimizer):
    """Mean-field variational inference: Adam on the mean and on the width of the posterior ("Bayes by backprop").

        w = μ + σ ∘ ε,   σ = log(1 + exp(ρ)),   ε ~ N(0, I)
        objective = E[mean loss at w] + τ KL(N(μ, σ²) ‖ N(m₀, 1/λ)) / N
        gradient by μ:   ĝ + τ λ (μ − m₀) / N
        gradient by ρ:   (ĝ ∘ ε + τ (λ σ − 1/σ) / N) ∘ σ'(ρ),   σ'(ρ) = 1 / (1 + exp(−ρ))

    with ĝ the gradient of the batch's mean loss at w, and both averages over the draws. μ and ρ are updated by Adam,

        m_{t+1} = β₁ m_t + (1 − β₁) g,   v_{t+1} = β₂ v_t + (1 − β₂) g²
        x_{t+1} = x_t − α (m_{t+1} / (1 − β₁^{t+1})) / (sqrt(v_{t+1} / (1 − β₂^{t+1})) + e)

    Sources: Blundell et al., "Weight Uncertainty in Neural Networks", ICML 2015, section 3.2, with the divergence from
    the Gaussian prior in closed form; Kingma and Ba, "Adam", ICLR 2015.

    Args:
        model: the network. Needing no gradients of single samples, it may mix samples (BatchNorm).
        loss_fn: as for `VOGN`.
        lr: α.
        betas: β₁ and β₂.
        eps: e, added to the roots.
        scale_init: σ at the start.
        shared: `data_size` and the other settings of all rules (`prior_precision`, `prior_mean`, `prior`,
            `temperature`, `temperature_start`, `temperature_steps`, `max_grad_norm`, `augmentation`,
            `mc_samples`, `loss_reduction`, `generator`, `params`), as for `VOGN`; by default
            `prior_precision` and `temperature` are 1. `max_grad_norm` scales ĝ, but not ĝ ∘ ε.

    Raises:
        OptionError: an argument is out of its range, or a parameter is not the model's, frozen, or given twice.
    """

    rule: ClassVar[str] = "MeanFieldVI"
    state_kinds: ClassVar[Kinds] = {
        "rho": FINITE,
        "mean_first": FINITE,
        "mean_second": NOT_NEGATIVE,
        "rho_first": FINITE,
        "rho_second": NOT_NEGATIVE,
        "first_mass": MASS,
        "second_mass": MASS,
    }
    keeps_draws_apart: ClassVar[bool] = True

    def __init__(
        self,
        model: Trained,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        scale_init: float = 0.01,
        **shared: Unpack[SharedSettings],
    ) -> None:
        settings = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "scale_init": scale_init,
        }
        super().__init__(model, loss_fn, settings, **shared)

    def _new_state(self, param: Tensor, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "rho": torch.full_like(param, math.log(math.expm1(settings["scale_init"]))),
            **{key: torch.zeros_like(param) for key in _AVERAGES},
            **dict.fromkeys(_MASSES, 0.0),
        }

    def _part_precision(self, part: Part) -> Tensors:
        return torch._foreach_pow(_scale(part), -2)

    def _effective_lr(self, part: Part) -> Tensors:
        masses = [mass or 1.0 for mass in part.state("second_mass")]
        root = torch._foreach_sqrt(torch._foreach_div(part.state("mean_second"), masses))
        denominator = torch._foreach_add(root, part.settings["eps"])
        return torch._foreach_mul(torch._foreach_reciprocal(denominator), part.settings["lr"])

    def _update(
        self, part: Part, gradient: list[Tensor], observed: list[Observed]
    ) -> tuple[Tensors, list[dict[str, Any]]]:
        by_mean = part.with_prior(gradient)
        scale = _scale(part)
        by_scale = core.add_prior(_mean_products(part, observed), scale, **part.objective)
        # The entropy's part of the divergence, − log σ.
        torch._foreach_addcdiv_(
            by_scale, [torch.ones_like(s) for s in scale], scale, value=-part.temperature / part.data_size
        )
        by_rho = torch._foreach_mul(by_scale, torch._foreach_sigmoid(part.state("rho")))
        mean, of_mean, masses = _adam(part, part.mean, by_mean, "mean")
        rho, of_rho, masses = _adam(part, part.state("rho"), by_rho, "rho")
        rows = zip(rho, *of_mean, *of_rho, *masses, strict=True)
        return mean, [dict(zip(("rho", *_AVERAGES, *_MASSES), row, strict=True)) for row in rows]


# The averages of Adam: first and second moment of the gradient, by the mean and by ρ.
_AVERAGES = ("mean_first", "mean_second", "rho_first", "rho_second")

# Their masses, see `core.running_average`, which are the same for both.
_MASSES = ("first_mass", "second_mass")


def _scale(part: Part) -> Tensors:
    """σ = log(1 + exp(ρ))."""
    return [torch.nn.functional.softplus(rho) for rho in part.state("rho")]


def _mean_products(part: Part, observed: list[Observed]) -> Tensors:
    """ĝ ∘ ε of each draw, averaged over draws, weighted by their numbers of samples."""
    total = sum(draw.moments.batch_size for draw in observed)
    products = [torch.zeros_like(m) for m in part.mean]
    for draw in observed:
        assert draw.noise is not None
        gradient, noise = part.of(draw.moments.mean), part.of(draw.noise)
        torch._foreach_addcmul_(products, gradient, noise, value=draw.moments.batch_size / total)
    return products


def _adam(
    part: Part, values: Tensors, gradient: Tensors, which: str
) -> tuple[Tensors, tuple[Tensors, Tensors], tuple[list[float], list[float]]]:
    """One step of Adam: the new values, the new averages, and the new masses of both."""
    beta1, beta2 = part.settings["betas"]
    first_mass, second_mass = (part.state(mass) for mass in _MASSES)
    first, new_first_mass, corrected_first = core.running_average(
        part.state(f"{which}_first"), first_mass, gradient, decay=beta1
    )
    second, new_second_mass, corrected_second = core.running_average(
        part.state(f"{which}_second"), second_mass, torch._foreach_mul(gradient, gradient), decay=beta2
    )
    denominator = torch._foreach_add(torch._foreach_sqrt(corrected_second), part.settings["eps"])
    new_values = core.update_mean(values, corrected_first, denominator, lr=part.settings["lr"])
    return new_values, (first, second), (new_first_mass, new_second_mass)
