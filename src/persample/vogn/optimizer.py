"""What all rules have in common: a `torch.optim.Optimizer` that draws weights, observes gradients there, and steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from persample.errors import OptionError, UsageError
from persample.sources.recording.results import LossReduction
from persample.vogn import core
from persample.vogn.changed_gradients import Left
from persample.vogn.changed_parameters import (
    fingerprint,
    present_names,
    refuse_resized,
    refuse_shared_memory,
    warn_of_untrained,
)
from persample.vogn.checks import check_positive, first_non_finite, skip_step
from persample.vogn.core import Tensors
from persample.vogn.diagnostics import FIRST_LOOK, Diagnostics, LayerDiagnostics, layer_diagnostics, warn_of_width
from persample.vogn.distributed import Processes, warn_of_separate_processes
from persample.vogn.observations import Observations, Observed
from persample.vogn.param_group import Part, make_part
from persample.vogn.posterior import Posterior
from persample.vogn.prior import Prior
from persample.vogn.settings import (
    OF_WEIGHTS,
    RUN,
    check_generator,
    check_settings,
    each_weights,
    groups_of,
    name_params,
    params_of_group,
    refuse_unknown_settings,
    settings_of_run,
)
from persample.vogn.supported_models import refuse_model
from persample.vogn.with_draws import MomentSource, WithDraws
from persample.vogn.with_posterior import WithPosterior
from persample.vogn.with_saving import WithSaving


class VariationalOptimizer(WithDraws, WithPosterior, WithSaving):
    """Base of the optimizers that train a Gaussian posterior over the weights of a model.

    The model holds the mean μ, except inside `observe()`, `predict()` and `sampled_params()`, which put it back bit for
    bit, whatever happens in them. A training step is

        loss = optimizer.observe(inputs, targets)   # draws weights, collects the moments of the gradients there
        optimizer.step()                            # updates the posterior; forgets the moments

    A rule is a subclass in a file of its own. It implements `_make_source`, `_new_state`, `_part_precision`, `_update`
    and `_effective_lr`; everything else (groups, draws, what is observed, steps that are skipped, saving) is the same
    for all.

    Args:
        model: the network.
        loss_fn: `loss_fn(outputs, targets)` returns minus the log-likelihood of each sample, shape `(B,)`. None if only
            passes of your own are recorded, see `sampled_params()`.
        defaults: the settings of the rule, which a group may change.
        data_size: N, the number of training samples.
        augmentation: ρ, by which N is multiplied where random changes of the inputs make more of them.
        mc_samples: draws of the weights in each `observe()`.
        loss_reduction: how losses are reduced to a scalar in your own passes, see `sampled_params()`.
        max_grad_norm: ĝ is scaled down to this norm if it is longer; None leaves it as it is.
        prior: a Gaussian prior with a mean and a precision for each weight, in place of the settings prior_mean and
            prior_precision: for example an earlier posterior.
        generator: source of the noise; None is PyTorch's global generator.
        params: the parameters to train, or parameter groups; None is all that require a gradient.
        process_group: the processes that train together; None is this one alone.

    Raises:
        OptionError: an argument is out of its range; a parameter is not the model's, frozen, or given twice; or the
            model is wrapped in DistributedDataParallel or DataParallel.
        UnsupportedModelError: the parameters are sharded.
    """

    augmentation: float
    max_grad_norm: float | None

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor] | None,
        defaults: dict[str, Any],
        *,
        data_size: int,
        augmentation: float,
        mc_samples: int,
        loss_reduction: LossReduction,
        max_grad_norm: float | None,
        prior: Prior | None,
        generator: torch.Generator | None,
        params: Iterable[Any] | None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        refuse_model(model, several_processes=not self.keeps_draws_apart)
        check_generator("generator", generator)
        of_run = {
            "data_size": data_size,
            "augmentation": augmentation,
            "mc_samples": mc_samples,
            "loss_reduction": loss_reduction,
            "max_grad_norm": max_grad_norm,
        }
        vars(self).update(settings_of_run(of_run))
        self.generator = generator
        self.model = model
        self.loss_fn = loss_fn
        self.source = self._make_source()
        self.steps = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self._observations = Observations()
        self._left: Left | None = None
        self._used: Mapping[str, Tensor] = {}
        self._warned_of_gradients = False
        self._warned_of_width = False
        self._warned_of_state = False
        self._drawn = False
        self._processes: Processes | None = None
        if prior is not None:
            defaults |= _settings_of(prior)
        super().__init__(groups_of(params, model), defaults)
        # Parameters that could be trained and are in no group were left out on purpose.
        self._known_as_untrained = {name for name, p in model.named_parameters() if p.requires_grad} - {*self._params()}
        self._seen: Any = None
        self._follow_model()
        if process_group is None:
            warn_of_separate_processes()
        else:
            self._processes = Processes(process_group)
            self._processes.share_model(model)
            seed = torch.initial_seed() if generator is None else generator.initial_seed()
            self.generator = torch.Generator().manual_seed(self._processes.share_seed(seed))

    # What a rule implements.

    @abstractmethod
    def _make_source(self) -> MomentSource:
        """Return what gives the moments of the gradients."""

    @abstractmethod
    def _new_state(self, param: Tensor, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state with which a parameter begins: tensors in its shape, dtype and device, and numbers.

        Args:
            param: the mean, in at least float32.
            settings: the settings of its group.
        """

    @abstractmethod
    def _part_precision(self, part: Part) -> Tensors:
        """Return the precision of the posterior over each weight."""

    @abstractmethod
    def _update(
        self, part: Part, gradient: list[Tensor], observed: list[Observed]
    ) -> tuple[Tensors, list[dict[str, Any]]]:
        """Return the new means and the new states. Changes nothing that is passed in.

        Args:
            part: the parameters.
            gradient: ĝ of each, averaged over samples and draws.
            observed: what it comes from; one entry for each draw if the rule keeps draws apart.
        """

    @abstractmethod
    def _effective_lr(self, part: Part) -> Tensors:
        """Return by how much the next step moves each weight for a gradient of 1."""

    def _warn_of_state(self, part: Part) -> bool:
        """Warn of what is wrong with the state of the parameters; return whether it warned."""
        return False

    # What users call.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model, with settings of their own, to those that are trained.

        Args:
            param_group: "params" and any of the settings of the rule.

        Raises:
            OptionError: a setting is out of its range, or a parameter is not the model's, frozen, or given twice.
        """
        named = name_params(self.model, params_of_group(param_group), taken=self._params().values())
        refuse_unknown_settings(param_group, self.defaults)
        group = {**self.defaults, **param_group}
        for setting in OF_WEIGHTS:
            group[setting] = each_weights(setting, group[setting], named)
        check_settings(group)
        super().add_param_group({**group, "params": list(named.items()), RUN: None})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the posterior from all that was observed since the last step, and forget it.

        With a closure, `mc_samples` draws are observed before: at each of them the closure runs the model and
        `loss.backward()` as inside `sampled_params(train=True)`, and returns the loss. A closure that does nothing and
        returns None changes nothing if something was observed before, as trainers hand one to every step.

        A step that would make the mean or its precision infinite or not a number is skipped with a
        `SkippedStepWarning`: nothing is changed, and what was observed is forgotten. `skipped_steps` counts them.

        Args:
            closure: runs forward and backward.

        Returns:
            The loss that the closure returned, averaged over the draws, detached; None without a closure.

        Raises:
            UsageError: nothing was observed, it is called inside `sampled_params()`, or a parameter was replaced or
                resized since the optimizer was made.
            OptionError: a setting has left its range since, or `closure` is no function.
            NonFiniteError: the fifth step in a row would be skipped.
            PersampleError: whatever recording the closure's passes raises.

        If it raises, nothing is changed.
        """
        self._refuse_while_drawn("step()")
        if closure is not None and not callable(closure):
            raise OptionError(f"closure={closure!r}: must be a function without arguments, or None.")
        self._follow_model()
        loss = None if closure is None else self._observe_closure(closure)
        self._follow_model()
        if closure is None and self._is_asked_for_its_state():
            self._make_states()
            return None
        overflowed = self._scaler_overflowed()
        if not overflowed:
            self._take_changes(at_the_step=True)
        observations = self._observations
        if self._processes is not None:
            observations = self._processes.merged(observations, self._params())
        if not observations.parts:
            raise UsageError(
                "Nothing was observed since the last step: call optimizer.observe(inputs, targets) first, or run "
                "forward and backward inside `with optimizer.sampled_params(train=True):` or in a closure."
            )
        new = [] if overflowed else self._updated(observations)
        self._forget()
        if overflowed:
            self.skipped_steps += 1
        else:
            self._apply(new)
        return loss

    def _apply(self, new: list[tuple[str, Tensor, dict[str, Any]]]) -> None:
        """Give the parameters their new means and states, unless they are not finite."""
        spoilt = first_non_finite([(name, t) for name, mean, state in new for t in (mean, *_tensors(state))])
        if spoilt is not None:
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
            skip_step(spoilt, self.skipped_in_a_row)
            return
        params = self._params()
        torch._foreach_copy_([params[name] for name, _, _ in new], [mean for _, mean, _ in new])
        for name, _, state in new:
            self.state[params[name]] = {"step": self.state[params[name]]["step"] + 1, **state}
        self.steps += 1
        self.skipped_in_a_row = 0
        if self.steps >= FIRST_LOOK and (self.steps // FIRST_LOOK).bit_count() == 1 and self.steps % FIRST_LOOK == 0:
            self._look()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients as every PyTorch optimizer does, and forget what was observed since the last step.

        Inside `sampled_params()` and closures only the gradients are reset.
        """
        super().zero_grad(set_to_none)
        if not self._drawn:
            self._forget()
            self._used = {}

    def _forget(self) -> None:
        """Forget what was observed."""
        self._observations, self._left = Observations(), None

    @torch.no_grad()
    def diagnostics(self) -> Diagnostics:
        """Return how the training goes: effective learning rate, signal-to-noise ratio and σ of each parameter.

        Raises:
            UsageError: inside `sampled_params()`, where the model holds a draw.
        """
        self._refuse_while_drawn("diagnostics()")
        self._follow_model()
        layers: dict[str, LayerDiagnostics] = {}
        for part in self._parts(self._params()):
            scale = core.precision_to_scale(self._part_precision(part))
            rows = zip(part.names, part.mean, scale, self._effective_lr(part), strict=True)
            layers |= {name: layer_diagnostics(mean, sigma, lr) for name, mean, sigma, lr in rows}
        return Diagnostics(self.steps, self.skipped_steps, layers)

    @property
    def posterior(self) -> Posterior:
        """The posterior as it is now, with tensors of its own and the optimizer's model.

        Raises:
            UsageError: inside `sampled_params()`, where the model holds a draw.
        """
        self._refuse_while_drawn("posterior")
        self._follow_model()
        params = self._params()
        precision = dict(zip(params, self._precision(), strict=True))
        mean = {name: p.detach().to(precision[name].dtype, copy=True) for name, p in params.items()}
        return Posterior(mean, precision, self.model)

    @property
    def prior(self) -> Prior:
        """The prior over the trained parameters."""
        self._follow_model()
        mean: dict[str, Tensor] = {}
        precision: dict[str, Tensor] = {}
        for part in self._parts(self._params()):
            mean |= part.per_weight(part.prior_mean)
            precision |= part.per_weight(part.prior_precision)
        return Prior(mean, precision)

    # Inner workings.

    def _follow_model(self) -> None:
        """Take notice of what changed in the model, and refuse what cannot be followed.

        Parameters that have another name now, as after pruning, are followed.

        Raises:
            UsageError: a parameter was replaced, removed, resized, or tied by its memory; or it has another name than
                when it was observed.
            UnsupportedModelError: a parameter was sharded.
        """
        settings_of_run(vars(self))
        seen = fingerprint(self.model), [id(p) for group in self.param_groups for p in group["params"]]
        if seen == self._seen:
            return
        for group in self.param_groups:
            self._follow_group(group)
        trained = self._params()
        refuse_shared_memory(trained)
        ids = {id(p) for p in trained.values()}
        for param in [p for p in self.state if id(p) not in ids]:  # of which the user has taken the place in its group
            del self.state[param]
        warn_of_untrained(self.model, trained.values(), self._known_as_untrained)
        self._seen = seen

    def _follow_group(self, group: dict[str, Any]) -> None:
        params = group["params"]
        present = present_names(self.model, params, group["param_names"])
        of_weights = [group[setting] for setting in OF_WEIGHTS if isinstance(group[setting], list)]
        if any(len(values) != len(params) for values in of_weights):
            raise UsageError(
                "The parameters of a group were changed by hand, but not its prior_mean and prior_precision, which "
                "have a tensor for each of them."
            )
        for name, param, *kept in zip(present, params, *of_weights, strict=True):
            refuse_resized(name, param, [*kept, *_tensors(self.state.get(param, {}))])
        if present != group["param_names"] and self._observations.parts:
            raise UsageError(
                "Parameters have other names than when they were observed: call step(), or zero_grad() to forget what "
                "was observed, before the model is changed."
            )
        group["param_names"] = present

    def _is_asked_for_its_state(self) -> bool:
        """Whether this is no step, but the request to make the states that `torch.distributed.checkpoint` wants to see.

        It makes it of every optimizer that has none, by a step with zeros in all `p.grad`, and learning rates of zero.
        """
        if self.state or self._observations.parts or any(group["lr"] != 0 for group in self.param_groups):
            return False
        gradients = [p.grad for p in self._params().values() if p.requires_grad]
        return all(g is not None for g in gradients) and not any(bool(g.any()) for g in gradients if g is not None)

    #: Asks `torch.amp.GradScaler.step` to say whether gradients overflowed, instead of leaving this step out.
    _step_supports_amp_scaling = True

    def _scaler_overflowed(self) -> bool:
        """Whether a gradient scaler found gradients that are not finite, as it does now and then on purpose."""
        found_inf = getattr(self, "found_inf", None)  # set by GradScaler.step for the time of the step
        if found_inf is None:
            return False
        if self._observations.without_scaler:
            raise UsageError(
                "The loss was scaled by a GradScaler, but sampled_params() was not told: write "
                "sampled_params(train=True, grad_scaler=scaler), so that the scale can be taken out before squaring."
            )
        return bool(found_inf) if self._processes is None else self._processes.any(bool(found_inf))

    def _params(self) -> dict[str, Tensor]:
        """All trained parameters by name, in the order of the groups."""
        named = (zip(group["param_names"], group["params"], strict=True) for group in self.param_groups)
        return {name: p for pairs in named for name, p in pairs}

    def _state(self, param: Tensor, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The state of `param`, made at its first use, and moved and cast wherever the model was moved and cast."""
        state: dict[str, Any] = self.state[param]
        dtype = torch.promote_types(param.dtype, torch.float32)
        if not state:
            with torch.no_grad(), torch.inference_mode(False):  # training goes on from it, even if a prediction made it
                state |= {"step": 0, **self._new_state(param.detach().to(dtype), settings)}
        for key, value in state.items():
            if isinstance(value, Tensor) and (value.dtype != dtype or value.device != param.device):
                state[key] = value.to(param.device, dtype)
        return state

    def _make_states(self) -> None:
        self._parts(self._params())

    def _parts(self, names: Iterable[str]) -> list[Part]:
        """The parameters called `names`, group by group."""
        size = self.data_size * self.augmentation
        parts = [
            make_part(group, self._state, data_size=size, step=self.steps, names=names) for group in self.param_groups
        ]
        return [part for part in parts if part.names]

    def _precision(self) -> list[Tensor]:
        """The precision of the posterior over all trained parameters, in the order of the groups."""
        total: list[Tensor] = []
        for part in self._parts(self._params()):
            precision = self._part_precision(part)
            if part.is_flat:
                check_positive(dict(zip(part.names, precision, strict=True)))
            total += precision
        return total

    def _look(self) -> None:
        """Warn of known ways to fail, of each once."""
        if not self._warned_of_width:
            params = [p.detach() for p in self._params().values()]
            self._warned_of_width = warn_of_width(params, list(core.precision_to_scale(self._precision())))
        if not self._warned_of_state:
            self._warned_of_state = any(self._warn_of_state(part) for part in self._parts(self._params()))

    def _updated(self, observations: Observations) -> list[tuple[str, Tensor, dict[str, Any]]]:
        """The observed parameters, each with the mean and the state that the step gives it. Changes nothing."""
        gradient = observations.gradient()
        if self.max_grad_norm is not None:
            clipped = core.clip_norm(list(gradient.values()), self.max_grad_norm)
            gradient = dict(zip(gradient, clipped, strict=True))
        params = self._params()
        new = []
        for part in self._parts(gradient):
            check_settings(part.settings)
            means, states = self._update(part, part.of(gradient), observations.parts)
            means = [mean.to(params[name].dtype) for name, mean in zip(part.names, means, strict=True)]
            new += list(zip(part.names, means, states, strict=True))
        return new


def _settings_of(prior: Any) -> dict[str, Any]:
    """The prior as settings of the rule."""
    if isinstance(prior, Posterior):
        prior = prior.as_prior()
    if not isinstance(prior, Prior):
        raise OptionError(
            f"prior is of type {type(prior).__name__}: pass a persample.Prior, for example posterior.as_prior(); one "
            "number for all weights is prior_precision."
        )
    return {"prior_mean": prior.mean, "prior_precision": prior.precision}


def _tensors(state: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor)]
