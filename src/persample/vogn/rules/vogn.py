"""VOGN: variational online Gauss-Newton."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from persample.errors import OptionError
from persample.kernels import step
from persample.sources import make_source
from persample.vogn import core
from persample.vogn.core import Tensors
from persample.vogn.diagnostics import warn_of_stuck_curvature
from persample.vogn.failures import warn_of_first_step
from persample.vogn.first_argument import Trained
from persample.vogn.loss import loss_of
from persample.vogn.observations import Observed
from persample.vogn.optimizer import VariationalOptimizer
from persample.vogn.param_group import Part
from persample.vogn.pending import MomentSource
from persample.vogn.saving.state_schema import FINITE, MASS, NOT_NEGATIVE, Kinds
from persample.vogn.settings import SharedSettings


class VOGN(VariationalOptimizer):
    """Variational online Gauss-Newton: trains the mean and the variance of a Gaussian posterior over the weights.

        w ~ N(μ_t, 1 / (N s_t + λ))
        ĝ = Σ g_i / M,   h = Σ g_i² / M,   g_i the gradient of sample i's loss at w
        s_{t+1} = γ s_t + (1 − γ) h
        μ_{t+1} = μ_t − α (ĝ + λ μ_t / N) / (s_t + λ / N)

    That is Algorithm 1 of Jain and Khan, after Khan et al., ICML 2018: `persample.vogn.presets.algorithm1()`. With all
    settings the last line and the variance are

        m_{t+1} = β m_t + (1 − β) ĝ,   m̂ = m_{t+1} / (1 − β^{t+1})
        u = clip((m̂ + τ λ (μ_t − m₀) / N) / (s_t + d + τ λ / N), ±ξ)
        μ_{t+1} = μ_t − α u,   σ² = τ / (N (s_t + d) + τ λ),   N = ρ · data_size

    with temperature τ, damping d and augmentation ρ as in Osawa et al., NeurIPS 2019, ξ as in Shen et al., ICML 2024.
    At temperature τ the posterior minimises Σ_i E[loss_i] + τ KL(posterior ‖ prior).

    The model holds the mean μ, except inside `observe()`, `predict()` and `sampled_params()`, which put it back bit for
    bit, whatever happens in them. A training step is

        loss = optimizer.observe(inputs, targets)   # draws weights, collects the moments of the gradients there
        optimizer.step()                            # updates μ and s; forgets the moments

    The posterior has a precision for each weight. It is kept in at least float32. The mean is the parameter, in the
    parameter's dtype: in a half-precision model small updates are lost to rounding.

    Args:
        model: the network, or its `named_parameters()` or `parameters()`; BatchNorm in training mode and whatever else
            mixes samples is refused by the sources.
        loss_fn: `loss_fn(outputs, targets)` returns minus the log-likelihood of each sample, shape `(B,)`; needed by
            `observe()` and `elbo()`, not by passes of your own, see `sampled_params()`.
        data_size: the number of training samples.
        lr: α.
        prior_precision: λ of the prior N(m₀, 1/λ) over each weight, 5 by default. 0 is a flat prior. A mapping from
            the names of parameters to tensors gives each weight its own.
        prior_mean: m₀, likewise; 0 by default.
        prior: in place of the two before, a `Prior`: for example `posterior.as_prior()` of an earlier training, to go
            on with new data.
        decay: γ; 1 keeps the curvature at `hess_init`.
        hess_init: s_0. 0 is the algorithm as printed, whose first step of α N / λ gradients is nearly always too long:
            keep `lr / (hess_init + prior_precision / data_size)` below 0.5, or a `DangerousFirstStepWarning` says so.
        order: "printed" divides line 7 by s_t, as printed; "updated" by s_{t+1}, as most other implementations do.
        momentum: β of a running mean of ĝ, which line 7 then uses in place of ĝ.
        bias_correction: whether that mean is divided by 1 − β^{t+1}, as m̂; otherwise m_{t+1} itself is used.
        average_prior: whether the prior's term τ λ (μ − m₀) / N is averaged together with ĝ, as in Osawa et al.; it is
            added afterwards otherwise.
        damping: d, added to the curvature.
        temperature: τ, 0.3 by default.
        temperature_start: τ at the first step, if there is KL warm-up; 0.01 by default.
        temperature_steps: τ rises linearly from `temperature_start` to `temperature` over this number of steps; 0, the
            default, is no KL warm-up.
        max_update: ξ; None does not clip.
        max_grad_norm: ĝ is scaled down to this norm over all parameters if it is longer; the curvature is not touched.
            None, the default, leaves it as it is.
        augmentation: ρ, factor by which augmentation enlarges the data set; 1 by default.
        mc_samples: draws of the weights in each `observe()`, and of a closure in each `step(closure)`; 1 by default.
        loss_reduction: how losses are reduced to a scalar in passes of your own, see `sampled_params()`; "mean" by
            default.
        backend: name of the source of per-sample gradients (`persample.backends()` lists them).
        backend_options: options of that source, as `persample.make_source` takes them.
        generator: source of the noise; None is PyTorch's global generator. Its state is saved with the optimizer's.
        params: the parameters to train, or parameter groups, as in every PyTorch optimizer; None is all that require a
            gradient. A group may have its own settings, all of the above from `lr` to `max_update`. Other parameters of
            the model are neither drawn nor updated.
        process_group: the processes of `torch.distributed` that train this posterior together, for example
            `torch.distributed.group.WORLD`; None is this process alone. The model gets the weights of the first
            process. Each process then observes batches of its own, at draws that depend on the generator's seed, its
            rank and the step, and `step()`, which all must call, adds up what all have observed. A process without a
            batch calls `step()` alone.

    Raises:
        OptionError: an argument is out of its range, or a parameter is not the model's, frozen, or given twice.
        UnknownBackendError, MissingPackageError, UnsupportedModelError: see `persample.make_source`.
    """

    rule: ClassVar[str] = "VOGN"
    state_kinds: ClassVar[Kinds] = {
        "curvature": NOT_NEGATIVE,
        "momentum_buffer": replace(FINITE, optional=True),
        "momentum_mass": replace(MASS, optional=True),
    }
    _copied: ClassVar[tuple[str, ...]] = (*VariationalOptimizer._copied, "backend", "backend_options")

    def __init__(
        self,
        model: Trained,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        *,
        lr: float = 0.01,
        decay: float = 0.999,
        hess_init: float = 0.1,
        order: core.Order = "printed",
        momentum: float = 0.9,
        bias_correction: bool = True,
        average_prior: bool = False,
        damping: float = 0.0,
        max_update: float | None = None,
        backend: str = "fused",
        backend_options: Mapping[str, Any] | None = None,
        **shared: Unpack[SharedSettings],
    ) -> None:
        self.backend = backend
        if not isinstance(backend_options, Mapping | None):
            raise OptionError(f"backend_options is of type {type(backend_options).__name__}: pass a dict.")
        self.backend_options = dict(backend_options or {})
        settings = {
            "lr": lr,
            "decay": decay,
            "hess_init": hess_init,
            "order": order,
            "momentum": momentum,
            "bias_correction": bias_correction,
            "average_prior": average_prior,
            "damping": damping,
            "max_update": max_update,
        }
        shared.setdefault("prior_precision", 5.0)
        shared.setdefault("temperature", 0.3)
        super().__init__(model, loss_fn, settings, **shared)

    def _make_source(self) -> MomentSource:
        return make_source(self.backend, self.model, loss_of(self.loss_fn, self.model), **self.backend_options)

    def _new_state(self, param: Tensor, settings: Mapping[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = {"curvature": torch.full_like(param, settings["hess_init"])}
        if settings["momentum"] > 0:
            state |= {"momentum_buffer": torch.zeros_like(param), "momentum_mass": 0.0}
        return state

    def _part_precision(self, part: Part) -> Tensors:
        return core.posterior_precision(part.state("curvature"), damping=part.settings["damping"], **part.objective)

    def _effective_lr(self, part: Part) -> Tensors:
        return torch._foreach_mul(
            torch._foreach_reciprocal(_divisor(part, part.state("curvature"))), part.settings["lr"]
        )

    def _warn_of_state(self, part: Part) -> bool:
        curvature = dict(zip(part.names, part.state("curvature"), strict=True))
        settings = part.settings
        return warn_of_stuck_curvature(curvature, settings["hess_init"], settings["decay"], part.state("step"))

    def _update(
        self, part: Part, gradient: list[Tensor], observed: list[Observed]
    ) -> tuple[Tensors, list[dict[str, Any]]]:
        if any(state["step"] == 0 for state in part.states):
            warn_of_first_step(part.settings, part.data_size, part.temperature)
        return vogn_update(part, gradient, part.of(observed[0].moments.second_moment))


def vogn_update(part: Part, gradient: Tensors, second_moment: Tensors) -> tuple[Tensors, list[dict[str, Any]]]:
    """Lines 6 and 7 for the parameters of one group; see `VOGN`. Changes nothing that is passed in.

    Args:
        part: the means μ_t with their states: "curvature" s_t, and after momentum was used the running mean
            "momentum_buffer" and its "momentum_mass" (see `core.running_average`).
        gradient: ĝ.
        second_moment: h.

    Returns:
        μ_{t+1} and the new states.
    """
    settings = part.settings
    found = _by_kernel(part, gradient, second_moment)
    if found is not None:
        return found
    curvature = part.state("curvature")
    new_curvature = core.update_curvature(curvature, second_moment, decay=settings["decay"])
    new_states: list[dict[str, Any]] = [{"curvature": s} for s in new_curvature]

    if settings["average_prior"]:
        gradient = part.with_prior(gradient)
    if _has_momentum(part):
        buffers, masses, gradient = core.running_average(
            _momentum(part),
            [state.get("momentum_mass", 0.0) for state in part.states],
            gradient,
            decay=settings["momentum"],
            bias_correction=settings["bias_correction"],
        )
        for new, buffer, mass in zip(new_states, buffers, masses, strict=True):
            new |= {"momentum_buffer": buffer, "momentum_mass": mass}
    new_mean = core.update_mean(
        part.mean,
        gradient if settings["average_prior"] else part.with_prior(gradient),
        _divisor(part, curvature if settings["order"] == "printed" else new_curvature),
        lr=settings["lr"],
        max_update=settings["max_update"],
    )
    return new_mean, new_states


def _by_kernel(part: Part, gradient: Tensors, second_moment: Tensors) -> tuple[Tensors, list[dict[str, Any]]] | None:
    """The same by a compiled kernel; None where there is none, or where weights have their own priors."""
    settings, prior_mean = part.settings, part.prior_mean
    masses = {state.get("momentum_mass", 0.0) for state in part.states}
    if isinstance(part.prior_precision, list | tuple) or isinstance(prior_mean, list | tuple) or len(masses) != 1:
        return None
    beta = settings["momentum"]
    momentum = _momentum(part) if _has_momentum(part) else None
    mass = beta * masses.pop() + (1 - beta)
    prior = part.temperature / part.data_size * part.prior_precision
    found = step.update(
        part.mean,
        part.state("curvature"),
        momentum,
        gradient,
        second_moment,
        decay=settings["decay"],
        beta=beta,
        mass=mass if momentum is not None and settings["bias_correction"] else 1.0,
        averaged_prior=prior if settings["average_prior"] else 0.0,
        prior=0.0 if settings["average_prior"] else prior,
        prior_mean=prior_mean,
        shift=settings["damping"] + prior,
        lr=settings["lr"],
        max_update=settings["max_update"],
        order_updated=settings["order"] == "updated",
    )
    if found is None:
        return None
    new_mean, new_curvature, new_momentum = found
    new_states: list[dict[str, Any]] = [{"curvature": s} for s in new_curvature]
    for new, buffer in zip(new_states, new_momentum, strict=False):
        new |= {"momentum_buffer": buffer, "momentum_mass": mass}
    return new_mean, new_states


def _has_momentum(part: Part) -> bool:
    return part.settings["momentum"] > 0 or any("momentum_buffer" in state for state in part.states)


def _momentum(part: Part) -> list[Tensor]:
    """m_t, which is 0 before the first step that uses it."""
    return [
        state["momentum_buffer"] if "momentum_buffer" in state else torch.zeros_like(m)
        for state, m in zip(part.states, part.mean, strict=True)
    ]


def _divisor(part: Part, curvature: Tensors) -> Tensors:
    """Return s + d + τ λ / N."""
    return core.divisor(curvature, damping=part.settings["damping"], **part.objective)
