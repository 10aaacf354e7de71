"""IVON: improved variational online Newton."""

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
from persample.vogn.saving.state_schema import FINITE, MASS, Kinds
from persample.vogn.settings import SharedSettings


class IVON(VariationalOptimizer):
    """Improved variational online Newton: a Gaussian posterior from ordinary gradients of batches.

        w ~ N(μ_t, σ_t²),   σ_t² = 1 / (E (h_t + δ)),   E = N / τ,   δ = τ λ / N
        ĝ = the gradient of the batch's mean loss at w
        ĥ = ĝ ∘ (w − μ_t) / σ_t²
        m_{t+1} = β₁ m_t + (1 − β₁) ĝ,                      m̂ = m_{t+1} / (1 − β₁^{t+1})
        h_{t+1} = β₂ h_t + (1 − β₂) ĥ + ½ (1 − β₂)² (h_t − ĥ)² / (h_t + δ)
        u = clip((m̂ + δ (μ_t − m₀)) / (h_{t+1} + δ), ±ξ)
        μ_{t+1} = μ_t − α (h_0 + δ) u

    Source: Shen et al., "Variational Learning is Effective for Large Deep Networks", ICML 2024, Algorithm 1 and section
    3.2. ĥ estimates the diagonal of the Hessian by the reparameterisation trick, so no gradients of single samples are
    needed, and a step costs one ordinary backward pass for each draw. An entry of h may be negative; the last term of
    its update keeps h + δ positive. Of several draws, ĝ and ĥ are averaged.

    In the words of the paper, the effective sample size λ is E, and the weight decay δ. So `prior_precision` is the
    weight decay times the effective sample size, and `temperature` is N over the effective sample size.

    Args:
        model: the network. Needing no gradients of single samples, it may mix samples (BatchNorm).
        loss_fn: as for `VOGN`.
        lr: α.
        betas: β₁ and β₂.
        hess_init: h_0, above 0.
        rescale_lr: whether α is multiplied by h_0 + δ; if not, the last line is μ_{t+1} = μ_t − α u.
        max_update: ξ, the clip radius; None does not clip.
        shared: `data_size` and the other settings of all rules (`prior_precision`, `prior_mean`, `prior`,
            `temperature`, `temperature_start`, `temperature_steps`, `max_grad_norm`, `augmentation`,
            `mc_samples`, `loss_reduction`, `generator`, `params`, `process_group`), as for `VOGN`; by default
            `prior_precision` and `temperature` are 1. `max_grad_norm` scales ĝ, but not ĥ.

    Raises:
        OptionError: an argument is out of its range, or a parameter is not the model's, frozen, or given twice.
    """

    rule: ClassVar[str] = "IVON"
    state_kinds: ClassVar[Kinds] = {"momentum": FINITE, "momentum_mass": MASS, "hessian": FINITE}
    needs_products: ClassVar[bool] = True

    def __init__(
        self,
        model: Trained,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        *,
        lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.99999),
        hess_init: float = 1.0,
        rescale_lr: bool = True,
        max_update: float | None = None,
        **shared: Unpack[SharedSettings],
    ) -> None:
        settings = {
            "lr": lr,
            "betas": betas,
            "hess_init": hess_init,
            "rescale_lr": rescale_lr,
            "max_update": max_update,
        }
        super().__init__(model, loss_fn, settings, **shared)

    def _new_state(self, param: Tensor, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "momentum": torch.zeros_like(param),
            "momentum_mass": 0.0,
            "hessian": torch.full_like(param, settings["hess_init"]),
        }

    def _part_precision(self, part: Part) -> Tensors:
        return core.posterior_precision(part.state("hessian"), **part.objective)

    def _effective_lr(self, part: Part) -> Tensors:
        inverse = torch._foreach_reciprocal(_with_decay(part, part.state("hessian")))
        rates = torch._foreach_mul(inverse, part.settings["lr"])
        return torch._foreach_mul(rates, _first(part)) if part.settings["rescale_lr"] else rates

    def _update(
        self, part: Part, gradient: list[Tensor], observed: list[Observed]
    ) -> tuple[Tensors, list[dict[str, Any]]]:
        beta1, beta2 = part.settings["betas"]
        momentum, masses, corrected = core.running_average(
            part.state("momentum"), part.state("momentum_mass"), gradient, decay=beta1
        )
        old = part.state("hessian")
        precision = self._part_precision(part)
        estimate = torch._foreach_mul(part.of(observed[0].moments.second_moment), torch._foreach_sqrt(precision))
        hessian = core.update_hessian(old, estimate, _with_decay(part, old), decay=beta2)
        mean = core.update_mean(
            part.mean,
            part.with_prior(corrected),
            _with_decay(part, hessian),
            lr=part.settings["lr"],
            max_update=part.settings["max_update"],
        )
        if part.settings["rescale_lr"]:
            mean = torch._foreach_lerp(part.mean, mean, _first(part))
        keys = ("momentum", "momentum_mass", "hessian")
        return mean, [dict(zip(keys, row, strict=True)) for row in zip(momentum, masses, hessian, strict=True)]


def _with_decay(part: Part, hessian: Tensors) -> Tensors:
    """Return h + δ."""
    return core.divisor(hessian, **part.objective)


def _first(part: Part) -> Tensors:
    """Return h_0 + δ of each weight, or one number for all weights of a parameter."""
    start = [m.new_full((), part.settings["hess_init"]) for m in part.mean]  # `new_tensor` would wait for a GPU
    return _with_decay(part, start)
