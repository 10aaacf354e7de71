"""What all rules have in common: a `torch.optim.Optimizer` that draws weights, observes gradients there, and steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from persample.errors import OptionError, UsageError
from persample.moments import Moments
from persample.vogn import core
from persample.vogn.checks import check_positive, first_non_finite, skip_step
from persample.vogn.core import Tensors
from persample.vogn.diagnostics import FIRST_LOOK, Diagnostics, LayerDiagnostics, layer_diagnostics, warn_of_width
from persample.vogn.observed import Observations, Observed
from persample.vogn.part import Part, at_least_float32, make_part
from persample.vogn.posterior import Posterior
from persample.vogn.prior import Prior
from persample.vogn.processes import Processes
from persample.vogn.sampling import noise_from, noise_state, restored, standard_noise
from persample.vogn.settings import check_count, check_positive_number, check_settings, each_weights, name_params
from persample.vogn.with_posterior import WithPosterior
from persample.vogn.with_saving import WithSaving


class MomentSource(Protocol):
    """What gives the moments of the gradients of a batch at the weights that the model has."""

    def moments(self, inputs: Any, targets: Any) -> Moments:
        """Return the moments, as `persample.PerSampleGradSource.moments` does."""


class VariationalOptimizer(WithPosterior, WithSaving):
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
        loss_fn: `loss_fn(outputs, targets)` returns minus the log-likelihood of each sample, shape `(B,)`.
        defaults: the settings of the rule, which a group may change.
        data_size: N, the number of training samples.
        augmentation: ρ, by which N is multiplied where random changes of the inputs make more of them.
        mc_samples: draws of the weights in each `observe()`.
        max_grad_norm: ĝ is scaled down to this norm if it is longer; None leaves it as it is.
        prior: a Gaussian prior with a mean and a precision for each weight, in place of the settings prior_mean and
            prior_precision: for example an earlier posterior.
        generator: source of the noise; None is PyTorch's global generator.
        params: the parameters to train, or parameter groups; None is all that require a gradient.
        process_group: the processes that train together; None is this one alone.

    Raises:
        OptionError: an argument is out of its range, or a parameter is not the model's, frozen, or given twice.
    """

    #: Whether the rule needs the moments of each draw apart, with the noise of the draw.
    keeps_draws_apart: ClassVar[bool] = False

    #: Whether gradients are taken at draws from the posterior; otherwise at its mean.
    draws_for_training: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        defaults: dict[str, Any],
        *,
        data_size: int,
        augmentation: float,
        mc_samples: int,
        max_grad_norm: float | None,
        prior: Prior | None,
        generator: torch.Generator | None,
        params: Iterable[Any] | None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self.data_size = check_count("data_size", data_size)
        self.augmentation = check_positive_number("augmentation", augmentation)
        self.mc_samples = check_count("mc_samples", mc_samples)
        self.max_grad_norm = None if max_grad_norm is None else check_positive_number("max_grad_norm", max_grad_norm)
        self.generator = generator
        self.model = model
        self.loss_fn = loss_fn
        self.source = self._make_source()
        self.steps = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self._observations = Observations()
        self._warned_of_width = False
        self._warned_of_state = False
        self._drawn = False
        self._processes: Processes | None = None
        if prior is not None:
            defaults |= {"prior_mean": prior.mean, "prior_precision": prior.precision}
        if params is None:
            params = (p for p in model.parameters() if p.requires_grad)
        groups = list(params)
        if not groups:
            raise OptionError(
                "There is nothing to train: the model has no parameter that requires a gradient, or params is empty."
            )
        super().__init__(groups, defaults)
        if process_group is not None:
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
        params = param_group["params"]
        named = name_params(
            self.model, [params] if isinstance(params, Tensor) else params, taken=self._params().values()
        )
        group = self.defaults | param_group
        for setting in ("prior_precision", "prior_mean"):
            group[setting] = each_weights(setting, group[setting], named)
        check_settings(group)
        super().add_param_group({**group, "params": list(named.items())})

    def observe(self, inputs: Any, targets: Any, *, redraw: bool = True) -> Tensor:
        """Draw weights from the posterior `mc_samples` times, and collect the moments of the gradients there.

        Several `observe()` before one `step()` act as one large batch: batches count by their sizes, draws by their
        mean.

        Args:
            inputs: what the model takes: a tensor, a tuple of positional arguments, or a dict of keyword arguments. Dim
                0 is the sample.
            targets: what `loss_fn` takes.
            redraw: whether to draw anew. False takes the draws of the `observe()` before, if there was one since the
                last step: then the parts of a batch give exactly what the whole batch would have given.

        Returns:
            The loss, averaged over samples and draws, detached.

        Raises:
            UsageError: called inside `sampled_params()`, or `mc_samples` was changed before `redraw=False`.
            PersampleError: whatever the source refuses.

        If it raises, what was observed before stays, and nothing is added to it.
        """
        observations = self._observations
        earlier = [] if redraw else observations.draws
        if earlier and len(earlier) != self.mc_samples:
            raise UsageError(
                f"mc_samples was {len(earlier)} and is now {self.mc_samples}, so redraw=False cannot take the draws of "
                "the observe() before: change it between steps."
            )
        draws, losses = [], []
        generator = self._training_noise()
        with self._draws("observe()", generator, noisy=self.draws_for_training) as draw_weights:
            devices = {p.device for p in self._params().values()}
            for index in range(self.mc_samples):
                draws.append(earlier[index] if earlier else noise_state(generator, devices))
                with noise_from(draws[index], generator) if earlier else nullcontext():
                    noise = draw_weights()
                moments = self._own_moments(self.source.moments(inputs, targets))
                losses.append(moments.losses.mean())
                if self.keeps_draws_apart:
                    place = len(observations.parts) - self.mc_samples + index if earlier else None
                else:
                    place = 0 if observations.parts else None
                observations = observations.with_more(Observed(moments, noise), place)
        self._observations = replace(observations, draws=draws)
        return torch.stack(losses).mean()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the posterior from all that was observed since the last step, and forget it.

        A step that would make the mean or its precision infinite or not a number is skipped with a
        `SkippedStepWarning`: nothing is changed, and what was observed is forgotten. `skipped_steps` counts them.

        Raises:
            UsageError: nothing was observed, a closure was given, or it is called inside `sampled_params()`.
            OptionError: a setting of a group has left its range since.
            NonFiniteError: the fifth step in a row would be skipped.

        If it raises, nothing is changed.
        """
        self._refuse_while_drawn("step()")
        if closure is not None:
            raise UsageError(
                "step() takes no closure, because it needs the gradients of single samples: call "
                "optimizer.observe(inputs, targets), then optimizer.step()."
            )
        observations = self._observations
        if self._processes is not None:
            observations = self._processes.merged(observations, self._params())
        if not observations.parts:
            raise UsageError("Nothing was observed since the last step: call optimizer.observe(inputs, targets) first.")
        new = self._updated(observations)
        self._observations = Observations()
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
        """Reset the gradients as every PyTorch optimizer does, and forget what was observed since the last step."""
        super().zero_grad(set_to_none)
        self._observations = Observations()

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

    @torch.no_grad()
    def diagnostics(self) -> Diagnostics:
        """Return how the training goes: effective learning rate, signal-to-noise ratio and σ of each parameter.

        Raises:
            UsageError: inside `sampled_params()`, where the model holds a draw.
        """
        self._refuse_while_drawn("diagnostics()")
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
        params = self._params()
        precision = dict(zip(params, self._precision(), strict=True))
        mean = {name: p.detach().to(precision[name].dtype, copy=True) for name, p in params.items()}
        return Posterior(mean, precision, self.model)

    @property
    def prior(self) -> Prior:
        """The prior over the trained parameters."""
        mean: dict[str, Tensor] = {}
        precision: dict[str, Tensor] = {}
        for part in self._parts(self._params()):
            mean |= part.per_weight(part.prior_mean)
            precision |= part.per_weight(part.prior_precision)
        return Prior(mean, precision)

    # Inner workings.

    @contextmanager
    def _draws(
        self, call: str, generator: torch.Generator | None, *, noisy: bool = True
    ) -> Iterator[Callable[[], Mapping[str, Tensor] | None]]:
        """Yield a function that gives the parameters a new draw; afterwards they have their mean again.

        It returns the noise, by name, where the rule needs that. Unless `noisy`, the draws are the mean itself.
        """
        params = self._params()
        with self._lend_params(call), restored(list(params.values())) as saved:
            scale = core.precision_to_scale(self._precision()) if noisy else []

            def draw_weights() -> Mapping[str, Tensor] | None:
                if not noisy:
                    return None
                with torch.no_grad():
                    noise = standard_noise(scale, generator)
                    torch._foreach_copy_(list(params.values()), torch._foreach_addcmul(saved, scale, noise))
                return dict(zip(params, noise, strict=True)) if self.keeps_draws_apart else None

            yield draw_weights

    @contextmanager
    def _lend_params(self, call: str) -> Iterator[None]:
        """Refuse what would find draws instead of the mean, for as long as `call` writes draws into the model."""
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

    def _training_noise(self) -> torch.Generator | None:
        """Where the noise of this step comes from."""
        if self._processes is None or self.generator is None:
            return self.generator
        return self._processes.noise(self.generator.initial_seed(), self.steps + self.skipped_steps)

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

    def _own_moments(self, moments: Moments) -> Moments:
        """Those of `moments` that belong to trained parameters, in at least float32.

        A parameter that was frozen after the optimizer was made has no moments: it is still drawn, but not updated.
        """
        names = [name for name in self._params() if name in moments.mean]
        if not names:
            raise UsageError("All parameters of the optimizer were frozen after it was made: nothing is left to train.")
        second = moments.second_moment
        return Moments(
            moments.losses,
            {name: at_least_float32(moments.mean[name]) for name in names},
            {name: at_least_float32(second[name]) for name in names if name in second},
        )

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


def _tensors(state: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor)]
