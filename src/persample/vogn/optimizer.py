"""VOGN as a `torch.optim.Optimizer`: Algorithm 1 on the parameters of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from persample.errors import OptionError, UsageError
from persample.moments import Moments, merge_moments
from persample.sources import make_source
from persample.vogn import core
from persample.vogn.checkpoint import (
    check_matches,
    pack_generator,
    pack_moments,
    unpack_generator,
    unpack_moments,
    unpack_states,
)
from persample.vogn.checks import (
    check_count,
    check_positive,
    check_settings,
    first_non_finite,
    name_params,
    skip_step,
    warn_of_first_step,
)
from persample.vogn.posterior import Posterior
from persample.vogn.prior import Prior
from persample.vogn.sampling import draw, restored
from persample.vogn.update import update_group
from persample.vogn.with_posterior import WithPosterior

_COPIED = (
    "model",
    "loss_fn",
    "data_size",
    "mc_samples",
    "backend",
    "backend_options",
    "generator",
    "skipped_steps",
    "_skipped_in_a_row",
    "_observed",
)


class VOGN(WithPosterior, torch.optim.Optimizer):
    """Variational online Gauss-Newton: trains the mean and the variance of a Gaussian posterior over the weights.

        w ~ N(μ_t, 1 / (N s_t + λ))
        ĝ = Σ g_i / M,   h = Σ g_i² / M,   g_i the gradient of sample i's loss at w
        s_{t+1} = γ s_t + (1 − γ) h
        μ_{t+1} = μ_t − α (ĝ + λ μ_t / N) / (s_t + λ / N)

    The model holds the mean μ, except inside `observe()`, `predict()` and `sampled_params()`, which put it back bit for
    bit, whatever happens in them. A training step is

        loss = optimizer.observe(inputs, targets)   # draws weights, collects the moments of the gradients there
        optimizer.step()                            # updates μ and s; forgets the moments

    Several `observe()` before one `step()` act as one large batch: batches count by their sizes, draws by their mean.

    The posterior has a precision for each weight. It is kept in at least float32. The mean is the parameter, in the
    parameter's dtype: in a half-precision model small updates are lost to rounding.

    Args:
        model: the network; BatchNorm in training mode and whatever else mixes samples is refused by the sources.
        loss_fn: `loss_fn(outputs, targets)` returns minus the log-likelihood of each sample, shape `(B,)`.
        data_size: N, the number of training samples.
        lr: α.
        prior_precision: λ of the prior N(0, 1/λ) over each weight. 0 is a flat prior.
        decay: γ; 1 keeps the curvature at `hess_init`.
        hess_init: s_0. 0 is the algorithm as printed, whose first step of α N / λ gradients is nearly always too long:
            keep `lr / (hess_init + prior_precision / data_size)` below 0.5, or a `DangerousFirstStepWarning` says so.
        mc_samples: draws of the weights in each `observe()`.
        backend: name of the source of per-sample gradients (`persample.backends()` lists them).
        backend_options: options of that source, as `persample.make_source` takes them.
        order: "printed" divides line 7 by s_t, as printed; "updated" by s_{t+1}, as most other implementations do.
        momentum: β of a bias-corrected running mean of ĝ, which line 7 then uses in place of ĝ. The prior's term λ μ/N
            is not averaged: it is added afterwards.
        generator: source of the noise; None is PyTorch's global generator. Its state is saved with the optimizer's.
        params: the parameters to train, or parameter groups, as in every PyTorch optimizer; None is all that require a
            gradient. A group may have its own lr, prior_precision, decay, hess_init, momentum and order. Other
            parameters of the model are neither drawn nor updated.

    Raises:
        OptionError: an argument is out of its range, or a parameter is not the model's, frozen, or given twice.
        UnknownBackendError, MissingPackageError, UnsupportedModelError: see `persample.make_source`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        *,
        data_size: int,
        lr: float = 1e-3,
        prior_precision: float = 1.0,
        decay: float = 0.999,
        hess_init: float = 0.01,
        mc_samples: int = 1,
        backend: str = "hooks",
        backend_options: Mapping[str, Any] | None = None,
        order: core.Order = "printed",
        momentum: float = 0.0,
        generator: torch.Generator | None = None,
        params: Iterable[Any] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "prior_precision": prior_precision,
            "decay": decay,
            "hess_init": hess_init,
            "momentum": momentum,
            "order": order,
        }
        self.data_size = check_count("data_size", data_size)
        self.mc_samples = check_count("mc_samples", mc_samples)
        self.generator = generator
        self.model = model
        self.loss_fn = loss_fn
        self.backend = backend
        self.backend_options = dict(backend_options or {})
        self.source = make_source(backend, model, loss_fn, **self.backend_options)
        self.skipped_steps = 0
        self._skipped_in_a_row = 0
        self._observed: Moments | None = None
        self._drawn = False
        check_settings(defaults)
        if params is None:
            params = (p for p in model.parameters() if p.requires_grad)
        groups = list(params)
        if not groups:
            raise OptionError(
                "There is nothing to train: the model has no parameter that requires a gradient, or params is empty."
            )
        super().__init__(groups, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model, with settings of their own, to those that are trained.

        Args:
            param_group: "params" and any of the keys lr, prior_precision, decay, hess_init, momentum, order.

        Raises:
            OptionError: a setting is out of its range, or a parameter is not the model's, frozen, or given twice.
        """
        check_settings(self.defaults | param_group)
        params = param_group["params"]
        named = name_params(
            self.model, [params] if isinstance(params, Tensor) else params, taken=self._params().values()
        )
        super().add_param_group({**param_group, "params": list(named.items())})

    def observe(self, inputs: Any, targets: Any) -> Tensor:
        """Draw weights from the posterior `mc_samples` times, and collect the moments of the gradients there.

        Args:
            inputs: what the model takes: a tensor, a tuple of positional arguments, or a dict of keyword arguments. Dim
                0 is the sample.
            targets: what `loss_fn` takes.

        Returns:
            The loss, averaged over samples and draws, detached.

        Raises:
            UsageError: called inside `sampled_params()`.
            PersampleError: whatever the source refuses.

        If it raises, what was observed before stays, and nothing is added to it.
        """
        observed, losses = self._observed, []
        with self._draws("observe()", self.generator) as draw_weights:
            for _ in range(self.mc_samples):
                draw_weights()
                moments = self._own_moments(self.source.moments(inputs, targets))
                observed = moments if observed is None else merge_moments([observed, moments])
                losses.append(moments.losses.mean())
        self._observed = observed
        return torch.stack(losses).mean()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update mean and curvature from all that was observed since the last step, and forget it.

        A step that would make a mean or a curvature infinite or not a number is skipped with a `SkippedStepWarning`:
        nothing is changed, and what was observed is forgotten. `skipped_steps` counts them.

        Raises:
            UsageError: nothing was observed, a closure was given, or it is called inside `sampled_params()`.
            OptionError: a setting of a group has left its range since.
            NonFiniteError: the fifth step in a row would be skipped.

        If it raises, nothing is changed.
        """
        self._refuse_while_drawn("step()")
        if closure is not None:
            raise UsageError(
                "VOGN.step() takes no closure, because it needs the gradients of single samples: call "
                "optimizer.observe(inputs, targets), then optimizer.step()."
            )
        if self._observed is None:
            raise UsageError("Nothing was observed since the last step: call optimizer.observe(inputs, targets) first.")
        params, means, states = self._update(self._observed)
        spoilt = first_non_finite(dict(zip(params, means, strict=True))) or first_non_finite(
            {name: state["curvature"] for name, state in zip(params, states, strict=True)}
        )
        self._observed = None
        if spoilt is not None:
            self.skipped_steps += 1
            self._skipped_in_a_row += 1
            skip_step(spoilt, self._skipped_in_a_row)
            return
        torch._foreach_copy_(list(params.values()), means)
        self.state.update(zip(params.values(), states, strict=True))
        self._skipped_in_a_row = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients as every PyTorch optimizer does, and forget what was observed since the last step."""
        super().zero_grad(set_to_none)
        self._observed = None

    @contextmanager
    def sampled_params(self, generator: torch.Generator | None = None) -> Iterator[None]:
        """Let the model have one draw of its weights inside a `with` block; afterwards it has its mean again.

        Whatever is written to the parameters inside is overwritten by the mean.

        Args:
            generator: source of the noise; None is the optimizer's own.

        Raises:
            UsageError: called inside another `sampled_params()`.
        """
        with self._draws("sampled_params()", generator or self.generator) as draw_weights:
            draw_weights()
            yield

    @property
    def posterior(self) -> Posterior:
        """The posterior as it is now, with tensors of its own and the optimizer's model.

        Raises:
            UsageError: inside `sampled_params()`, where the model holds a draw.
        """
        self._refuse_while_drawn("posterior")
        precision = dict(zip(self._params(), self._precision(), strict=True))
        with torch.no_grad():
            mean = {name: p.detach().to(precision[name].dtype, copy=True) for name, p in self._params().items()}
        return Posterior(mean, precision, self.model)

    @property
    def prior(self) -> Prior:
        """The prior N(0, 1/λ) over the trained parameters."""
        mean: dict[str, Tensor] = {}
        precision: dict[str, Tensor] = {}
        for group in self.param_groups:
            like = {name: self._state(p, group)["curvature"] for name, p in _named(group).items()}
            part = Prior.isotropic(group["prior_precision"], like)
            mean |= part.mean
            precision |= part.precision
        return Prior(mean, precision)

    def state_dict(self) -> dict[str, Any]:
        """Return everything beside the model that a run needs to go on bit for bit, as plain tensors and numbers.

        To the entries of every PyTorch optimizer come `data_size`, `mc_samples`, the counts of skipped steps,
        `observed` (the moments that wait for the next step, or None) and `generator` (its device and state; None if
        the global generator is used, whose state is the caller's to save). It can be loaded with
        `torch.load(..., weights_only=True)`.

        Raises:
            UsageError: called inside `sampled_params()`, where the model holds a draw.
        """
        self._refuse_while_drawn("state_dict()")
        return {
            **super().state_dict(),
            "data_size": self.data_size,
            "mc_samples": self.mc_samples,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self._skipped_in_a_row,
            "observed": pack_moments(self._observed),
            "generator": pack_generator(self.generator),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict()` returned. Parameters correspond by position, as in every PyTorch optimizer.

        If the state has a generator and this optimizer has none, it gets one.

        Raises:
            UsageError: called inside `sampled_params()`.
            OptionError: it is not the state of a VOGN with the same parameters; nothing is changed.
        """
        self._refuse_while_drawn("load_state_dict()")
        check_matches(state_dict, self.param_groups)
        self.generator = unpack_generator(state_dict["generator"], self.generator)
        names = [group["param_names"] for group in self.param_groups]
        super().load_state_dict(dict(state_dict))
        for group, own_names in zip(self.param_groups, names, strict=True):
            group["param_names"] = own_names
        # PyTorch has cast the state to the dtypes of the parameters, but the curvature is in at least float32.
        self.state.update(unpack_states(state_dict, self.param_groups))
        self.data_size = state_dict["data_size"]
        self.mc_samples = state_dict["mc_samples"]
        self.skipped_steps = state_dict["skipped_steps"]
        self._skipped_in_a_row = state_dict["skipped_in_a_row"]
        self._observed = unpack_moments(state_dict["observed"], self._params())

    def __getstate__(self) -> dict[str, Any]:
        """Return all but the source, for `pickle` and `copy.deepcopy`: the model belongs to it, and is copied too."""
        self._refuse_while_drawn("copying or pickling the optimizer")
        return super().__getstate__() | {name: self.__dict__[name] for name in _COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # also called by load_state_dict, with two entries only
        if "source" not in self.__dict__:
            self.source = make_source(self.backend, self.model, self.loss_fn, **self.backend_options)
            self._drawn = False

    @contextmanager
    def _draws(self, call: str, generator: torch.Generator | None) -> Iterator[Callable[[], None]]:
        """Yield a function that gives the parameters a new draw; afterwards they have their mean again."""
        params = list(self._params().values())
        with self._lend_params(call), restored(params) as saved:
            scale = core.precision_to_scale(self._precision())

            def draw_weights() -> None:
                with torch.no_grad():
                    torch._foreach_copy_(params, draw(saved, scale, generator))

            yield draw_weights

    @contextmanager
    def _lend_params(self, call: str) -> Iterator[None]:
        self._refuse_while_drawn(call)
        self._drawn = True
        try:
            yield
        finally:
            self._drawn = False

    def _refuse_while_drawn(self, call: str) -> None:
        if self._drawn:
            raise UsageError(
                f"{call} came inside sampled_params(), or while observe() or predict() ran: there the parameters are "
                "a draw from the posterior instead of its mean. Call it outside."
            )

    def _params(self) -> dict[str, Tensor]:
        """All trained parameters by name, in the order of the groups."""
        return {name: p for group in self.param_groups for name, p in _named(group).items()}

    def _state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """The state of `param`, made at its first use: until then the model may be moved and cast."""
        if not self.state[param]:
            dtype = torch.promote_types(param.dtype, torch.float32)
            with torch.inference_mode(False):  # training goes on from this tensor, even if a prediction made it
                curvature = torch.full_like(param, group["hess_init"], dtype=dtype)
            self.state[param] = {"step": 0, "curvature": curvature}
        state: dict[str, Any] = self.state[param]
        return state

    def _precision(self) -> list[Tensor]:
        """N s + λ of all trained parameters, in the order of the groups."""
        precision: list[Tensor] = []
        for group in self.param_groups:
            curvature = {name: self._state(p, group)["curvature"] for name, p in _named(group).items()}
            prior_precision = group["prior_precision"]
            if prior_precision == 0:
                check_positive(curvature)
            precision += core.posterior_precision(
                list(curvature.values()), data_size=self.data_size, prior_precision=prior_precision
            )
        return precision

    def _own_moments(self, moments: Moments) -> Moments:
        """Those of `moments` that belong to trained parameters, in at least float32.

        A parameter that was frozen after the optimizer was made has no moments: it is still drawn, but not updated.
        """
        names = [name for name in self._params() if name in moments.mean]
        if not names:
            raise UsageError("All parameters of the optimizer were frozen after it was made: nothing is left to train.")
        mean = {name: _at_least_float32(moments.mean[name]) for name in names}
        second_moment = {name: _at_least_float32(moments.second_moment[name]) for name in names}
        return Moments(moments.losses, mean, second_moment)

    def _update(self, observed: Moments) -> tuple[dict[str, Tensor], list[Tensor], list[dict[str, Any]]]:
        """The observed parameters by name, with the mean and the state that the step gives them. Changes nothing."""
        params: dict[str, Tensor] = {}
        means: list[Tensor] = []
        states: list[dict[str, Any]] = []
        for group in self.param_groups:
            check_settings(group)
            named = {name: p for name, p in _named(group).items() if name in observed.mean}
            if not named:
                continue
            old_states = [self._state(p, group) for p in named.values()]
            if any(state["step"] == 0 for state in old_states):
                warn_of_first_step(group, self.data_size)
            new_means, new_states = update_group(
                group,
                self.data_size,
                list(named.values()),
                old_states,
                [observed.mean[name] for name in named],
                [observed.second_moment[name] for name in named],
            )
            params |= named
            means += new_means
            states += new_states
        return params, means, states


def _named(group: Mapping[str, Any]) -> dict[str, Tensor]:
    """The parameters of `group` by name."""
    return dict(zip(group["param_names"], group["params"], strict=True))


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
