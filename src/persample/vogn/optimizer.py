"""The base of all rules: a `torch.optim.Optimizer` that draws weights, observes gradients there, and steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from persample.dtypes import at_least_float32
from persample.errors import OptionError, UsageError
from persample.kernels.step import draw_
from persample.moments import Moments
from persample.sources.model.eager import not_compiled, refuse_compiled
from persample.sources.recording.errors import ModelNotCalledError, NothingRecordedError
from persample.sources.recording.results import LossReduction, Recorded
from persample.vogn import core
from persample.vogn.core import Tensors
from persample.vogn.diagnostics import FIRST_LOOK, Diagnostics, LayerDiagnostics, layer_diagnostics, warn_of_width
from persample.vogn.elbo import Elbo
from persample.vogn.failures import first_non_finite, skip_step
from persample.vogn.loss import require_loss
from persample.vogn.monte_carlo import DrawOptions
from persample.vogn.observations import Observations, Observed
from persample.vogn.param_group import Part
from persample.vogn.posterior_state import PosteriorState, tensors_of_state
from persample.vogn.prediction import GaussianPrediction, Likelihood, Summarised
from persample.vogn.sampling import NoiseState, noise_from, noise_state, restored, set_noise_state, standard_noise
from persample.vogn.settings import known_scale, require_generator, require_scale, require_settings
from persample.vogn.supported_models import refuse_replicas


class VariationalOptimizer(PosteriorState):
    """Base of the optimizers that train a Gaussian posterior over the weights of a model.

    The model holds the mean μ, except inside `observe()`, `predict()` and `sampled_params()`, which put it back bit for
    bit, whatever happens in them. A training step is

        loss = optimizer.observe(inputs, targets)   # draws weights, collects the moments of the gradients there
        optimizer.step()                            # updates the posterior; forgets the moments

    A rule is a subclass in a file of its own. It implements `_make_source`, `_new_state`, `_part_precision`, `_update`
    and `_effective_lr`; everything else (groups, draws, what is observed, steps that are skipped, saving) is the same
    for all.
    """

    #: Whether gradients are taken at draws from the posterior; otherwise at its mean.
    draws_for_training: ClassVar[bool] = True

    #: Whether a step for which nothing was observed does nothing: a trainer's, whose closure may skip a batch.
    _may_skip_batches = False

    # What a rule implements.

    @abstractmethod
    def _update(
        self, part: Part, gradient: list[Tensor], observed: list[Observed]
    ) -> tuple[Tensors, list[dict[str, Any]]]:
        """Return the new means and states, without changing the arguments.

        Args:
            part: the parameters.
            gradient: ĝ of each, averaged over samples and draws.
            observed: what it comes from; one entry for each draw if the rule keeps draws apart.
        """

    @abstractmethod
    def _effective_lr(self, part: Part) -> Tensors:
        """Return by how much the next step moves each weight for a gradient of 1."""

    def _warn_of_state(self, part: Part) -> bool:
        """Warn about problems in the state of the parameters; return whether it warned."""
        return False

    # What users call: training.

    @not_compiled
    def observe(self, inputs: Any, targets: Any, *, redraw: bool = True) -> Tensor:
        """Draw weights from the posterior `mc_samples` times, and collect the moments of the gradients at them.

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
            UsageError: called inside `sampled_params()`; `mc_samples` was changed before `redraw=False`; the optimizer
                has no loss; or a parameter was replaced or resized since it was made.
            PersampleError: whatever the source refuses.

        If it raises, what was observed before stays, and nothing is added to it.
        """
        require_loss(self.loss_fn, "observe()")
        observations = self._pending.observations
        earlier = [] if redraw else observations.draws
        if earlier and len(earlier) != self.mc_samples:
            raise UsageError(
                f"redraw=False reuses the {len(earlier)} draws since the last step, but mc_samples is now "
                f"{self.mc_samples}: change mc_samples only after a step."
            )
        draws, losses = [], []
        generator = self._training_noise()
        with self._draws("observe()", generator, noisy=self.draws_for_training) as draw_weights:
            for index in range(self.mc_samples):
                draws.append(earlier[index] if earlier else self._noise_state(generator))
                with noise_from(draws[index], generator) if earlier else nullcontext():
                    noise = draw_weights()
                observed = self._observed(self.source.moments(inputs, targets), noise)
                losses.append(observed.moments.losses.mean())
                place = len(observations.parts) - self.mc_samples + index if earlier else None
                observations = self._pending.with_more(observations, observed, place)
        self._pending.observations = replace(observations, draws=draws)
        return torch.stack(losses).mean()

    @contextmanager
    def sampled_params(
        self,
        train: bool = False,
        *,
        redraw: bool = True,
        loss_reduction: LossReduction | None = None,
        loss_scale: float | Callable[[], float] | None = None,
        grad_scaler: Any = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[None]:
        """Put a draw of the weights into the model inside a `with` block; the mean returns afterwards.

        With `train`, the moments of the gradients of your own forward and backward passes are collected:

            with optimizer.sampled_params(train=True):
                loss = torch.nn.functional.cross_entropy(model(inputs), targets)
                loss.backward()
            optimizer.step()

        Call the model itself, whose tensor arguments have the sample as dim 0, and `backward()` after each call.
        Several such pairs in one block, parts of a batch, act as one large batch at this draw; several blocks before a
        step as several draws. `p.grad` gets the gradient as ever. If you change it after the backward pass (clip, mask,
        add noise or the gradient of a penalty), `step()` takes what you made of it for the gradient; the curvature
        comes from the gradients of the single samples as they were.

        Whatever is written to the parameters inside is overwritten by the mean.

        Args:
            train: whether to collect moments.
            redraw: with `train`, whether to draw anew. False takes the draw of the block before, if there was one since
                the last step: then the parts of a batch give exactly what the whole batch would have given.
            loss_reduction: how the losses of the samples were reduced to a scalar, "mean" (over all samples that the
                model was called with) or "sum"; None is the optimizer's own.
            loss_scale: by what number that scalar was multiplied on purpose before the backward pass, such as 1 / 4
                where the gradients of four batches are accumulated; it is taken out again. Or a function that returns
                it, called when the block ends. None is 1, with a warning where it looks like another one.
            grad_scaler: the `torch.amp.GradScaler` that scaled the loss, whose scale is taken out before squaring.
            generator: source of the noise; None is the optimizer's own.

        Raises:
            UsageError: called inside another `sampled_params()`; or nothing was recorded, or passes cannot be told
                apart, or the backend runs the model itself (its error names another way).
            PersampleError: whatever the source refuses.

        If it raises, what was observed before stays, and nothing is added to it.
        """
        refuse_compiled("sampled_params()")
        require_generator("generator", generator)
        require_scale(loss_scale)
        if grad_scaler is not None and not callable(getattr(grad_scaler, "get_scale", None)):
            raise OptionError(f"grad_scaler={grad_scaler!r} must be the torch.amp.GradScaler that scales the loss.")
        noisy = self.draws_for_training or not train
        generator = generator or (self._training_noise() if train else self.generator)
        if train and not self._lending.out:
            self._follow_model()
            self._take_changes(at_the_step=False)
        earlier = [] if redraw or not train else self._pending.observations.draws[-1:]
        with self._draws("sampled_params()", generator, noisy=noisy) as draw_weights:
            draws = earlier or [self._noise_state(generator)]
            with noise_from(draws[0], generator) if earlier else nullcontext():
                noise = draw_weights()
            if not train:
                yield
                return
            with (
                refuse_replicas(self.model, several_processes=not self.keeps_draws_apart),
                self.source.recording(loss_reduction or self.loss_reduction) as recorded,
            ):
                yield
                recorded.loss_scale = known_scale(loss_scale)
            self._add_recorded(recorded, grad_scaler, noise, same_draw=bool(earlier))
            self._pending.observations = replace(self._pending.observations, draws=draws)

    @torch.no_grad()
    @not_compiled
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the posterior from the observations since the last step, and discard them.

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
        self._lending.refuse("step()")
        if closure is not None and not callable(closure):
            raise OptionError(f"closure={closure!r} must be a function without arguments, or None.")
        self._follow_model()
        loss = None
        if closure is not None:
            loss = self._observe_closure(closure)
            self._follow_model()
        if closure is None and self._is_asked_for_its_state():
            self._make_states()
            return None
        overflowed = self._scaler_overflowed()
        if not overflowed:
            self._take_changes(at_the_step=True)
        observations = self._pending.observations
        if self._processes is not None:
            observations = self._processes.merged(observations, self._params())
        if not observations.parts:
            if self._may_skip_batches:
                return None
            raise UsageError(
                "Nothing was observed since the last step: call optimizer.observe(inputs, targets) first, or run "
                "forward and backward inside `with optimizer.sampled_params(train=True):` or in a closure; trainers "
                "that run them by themselves need persample.integrations."
            )
        new = [] if overflowed else self._updated(observations)
        self._pending.forget()
        if overflowed:
            self.skipped_steps += 1
        else:
            self._apply(new)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients as every PyTorch optimizer does, and discard the observations since the last step.

        Inside `sampled_params()` and closures only the gradients are reset.
        """
        super().zero_grad(set_to_none)
        if not self._lending.out:
            self._pending.forget()
            self._pending.used = {}

    # What users call: the posterior.

    @not_compiled
    def predict(
        self,
        inputs: Any,
        *,
        likelihood: Likelihood | Summarised | None = None,
        progress: bool = False,
        **draws: Unpack[DrawOptions],
    ) -> Any:
        """Predict by averaging over draws of the weights: classes, or whatever the loss is a likelihood of.

        Returns a `ClassPrediction`; a `GaussianPrediction` if the likelihood, or the loss, is one of real numbers or
        counts of `persample.likelihoods`. See `Posterior.predict`.

        Args:
            inputs: what the model takes, or a DataLoader.
            progress: whether to show a bar over a DataLoader, by tqdm.
            likelihood: what the model returns; None goes by the loss.
            draws: samples, generator, draws_at_once, rows_at_once and pick, see `DrawOptions`.

        Raises:
            UsageError: no likelihood is given, and the loss is one of real numbers, or of probabilities.
            PersampleError: as `Posterior.predict`.
        """
        posterior = self.posterior
        with self._lending.lend("predict()"):
            drawn = self._with_generator(draws)
            return posterior.predict(inputs, likelihood=likelihood, progress=progress, **drawn)

    @not_compiled
    def predict_gaussian(
        self, inputs: Any, *, noise_precision: float = 1.0, progress: bool = False, **draws: Unpack[DrawOptions]
    ) -> GaussianPrediction:
        """Predict real numbers with a known noise; see `Posterior.predict_gaussian`."""
        posterior = self.posterior
        with self._lending.lend("predict_gaussian()"):
            drawn = self._with_generator(draws)
            return posterior.predict_gaussian(inputs, noise_precision=noise_precision, progress=progress, **drawn)

    @not_compiled
    def elbo(self, inputs: Any, targets: Any = None, *, progress: bool = False, **draws: Unpack[DrawOptions]) -> Elbo:
        """Estimate the evidence lower bound with the optimizer's loss, prior and N; see `Posterior.elbo`.

        Args:
            inputs: all training data, or a part of them that stands for all; or a DataLoader.
            targets: what the loss function takes; with a DataLoader, None.
            progress: whether to show a bar over a DataLoader, by tqdm.
            draws: samples, generator, draws_at_once, rows_at_once and pick, see `DrawOptions`.
        """
        loss_fn = require_loss(self.loss_fn, "elbo()")
        posterior, prior = self.posterior, self.prior
        with self._lending.lend("elbo()"):
            return posterior.elbo(
                loss_fn,
                inputs,
                targets,
                prior=prior,
                data_size=self.data_size,
                progress=progress,
                **self._with_generator(draws),
            )

    @torch.no_grad()
    def diagnostics(self) -> Diagnostics:
        """Return training diagnostics: effective learning rate, signal-to-noise ratio and σ of each parameter.

        Raises:
            UsageError: inside `sampled_params()`, where the model holds a draw.
        """
        self._lending.refuse("diagnostics()")
        self._follow_model()
        layers: dict[str, LayerDiagnostics] = {}
        for part in self._parts(self._params()):
            scale = core.precision_to_scale(self._part_precision(part))
            rows = zip(part.names, part.mean, scale, self._effective_lr(part), strict=True)
            layers |= {name: layer_diagnostics(mean, sigma, lr) for name, mean, sigma, lr in rows}
        return Diagnostics(self.steps, self.skipped_steps, layers)

    # Inner workings: draws and what is observed there.

    @contextmanager
    def _draws(
        self, call: str, generator: torch.Generator | None, *, noisy: bool = True
    ) -> Iterator[Callable[[], Mapping[str, Tensor] | None]]:
        """Yield a function that writes a new draw into the parameters; the mean returns afterwards.

        It returns the noise, by name, where the rule needs that. Unless `noisy`, the draws are the mean itself.
        """
        self._follow_model()
        params = self._params()
        with self._lending.lend(call), restored(list(params.values())) as saved:
            precision = self._precision() if noisy else []

            def draw_weights() -> Mapping[str, Tensor] | None:
                if not noisy:
                    return None
                with torch.no_grad():
                    noise = standard_noise(precision, generator)
                    draw_(list(params.values()), saved, precision, noise)
                needed = self.keeps_draws_apart or self.needs_products
                return dict(zip(params, noise, strict=True)) if needed else None

            yield draw_weights

    def _add_recorded(
        self, recorded: Recorded, grad_scaler: Any, noise: Mapping[str, Tensor] | None, *, same_draw: bool
    ) -> None:
        scale = 1.0 if grad_scaler is None else grad_scaler.get_scale()
        observed = self._observed(recorded.moments(scale), noise)
        self._pending.add_recorded(
            recorded,
            observed,
            self._params(),
            scale=scale,
            scaler=grad_scaler is not None,
            place=len(self._pending.observations.parts) - 1 if same_draw else None,
        )

    def _take_changes(self, *, at_the_step: bool) -> None:
        """Take over changes of `p.grad` since the last block."""
        self._pending.take_changes(
            {name: p for name, p in self._params().items() if p.requires_grad},
            at_the_step=at_the_step,
            unscaled=hasattr(self, "found_inf") and getattr(self, "grad_scale", None) is None,
            several_processes=self._processes is not None,
        )

    def _observe_closure(self, closure: Callable[[], Any]) -> Any:
        """Call a closure that runs forward and backward at `mc_samples` draws; return its loss, averaged over them.

        One that does nothing leaves all as it is: trainers hand one to every step, also where passes were recorded
        before.
        """
        before, losses = self._pending.observations, []
        generator = self._training_noise()
        noise = self._noise_state(generator)
        try:
            for _ in range(self.mc_samples):
                with self.sampled_params(train=True), torch.enable_grad():
                    losses.append(closure())
        except NothingRecordedError as error:
            self._pending.observations = before
            did_nothing = isinstance(error, ModelNotCalledError) and (before.parts or self._processes is not None)
            if losses != [None] or not (did_nothing or self._may_skip_batches):
                raise
            set_noise_state(noise, generator)
            return None
        except BaseException:
            self._pending.observations = before
            raise
        if any(loss is None for loss in losses):
            return None
        return sum(loss.detach() if isinstance(loss, Tensor) else loss for loss in losses) / len(losses)

    def _observed(self, moments: Moments, noise: Mapping[str, Tensor] | None) -> Observed:
        """What was observed at a draw, from the moments there and the noise of the draw."""
        own = self._own_moments(moments)
        if not self.needs_products:
            return Observed(own, noise)
        assert noise is not None
        return Observed(replace(own, second_moment={name: g * noise[name] for name, g in own.mean.items()}))

    def _own_moments(self, moments: Moments) -> Moments:
        """The `moments` of trained parameters, in at least float32.

        A parameter that was frozen after the optimizer was made has no moments: it is still drawn, but not updated.
        """
        names = [name for name in self._params() if name in moments.mean]
        if not names:
            raise UsageError(
                "All parameters of the optimizer were frozen after it was created, so there is nothing to train: "
                "unfreeze some."
            )
        second = moments.second_moment
        return Moments(
            moments.losses,
            {name: at_least_float32(moments.mean[name]) for name in names},
            {name: at_least_float32(second[name]) for name in names if name in second},
        )

    def _noise_state(self, generator: torch.Generator | None) -> NoiseState:
        return noise_state(generator, {p.device for p in self._params().values()})

    def _training_noise(self) -> torch.Generator | None:
        """The generator of this step's noise."""
        if self._processes is None or self.generator is None:
            return self.generator
        return self._processes.noise(self.generator.initial_seed(), self.steps + self.skipped_steps)

    def _with_generator(self, draws: DrawOptions) -> DrawOptions:
        """The same options, with the optimizer's generator where none is given."""
        return {**draws, "generator": draws.get("generator") or self.generator}

    # Inner workings: the step.

    def _is_asked_for_its_state(self) -> bool:
        """Whether `torch.distributed.checkpoint` calls `step` only to create states.

        It makes it of every optimizer that has none, by a step with zeros in all `p.grad`, and learning rates of zero.
        """
        if self.state or self._pending.observations.parts or any(group["lr"] != 0 for group in self.param_groups):
            return False
        gradients = [p.grad for p in self._params().values() if p.requires_grad]
        return all(g is not None for g in gradients) and not any(bool(g.any()) for g in gradients if g is not None)

    #: Asks `torch.amp.GradScaler.step` to say whether gradients overflowed, instead of leaving this step out.
    _step_supports_amp_scaling = True

    def _scaler_overflowed(self) -> bool:
        """Whether a gradient scaler found gradients that are not finite, which is part of its search for a scale."""
        found_inf = getattr(self, "found_inf", None)  # set by GradScaler.step for the time of the step
        if found_inf is None:
            return False
        if self._pending.observations.without_scaler:
            raise UsageError(
                "The loss was scaled by a GradScaler that sampled_params() does not know: pass "
                "sampled_params(train=True, grad_scaler=scaler), so that the scale is divided out before squaring."
            )
        return bool(found_inf) if self._processes is None else self._processes.any(bool(found_inf))

    def _apply(self, new: list[tuple[str, Tensor, dict[str, Any]]]) -> None:
        """Store the new means and states, unless they are not finite."""
        spoilt = first_non_finite([(name, t) for name, mean, state in new for t in (mean, *tensors_of_state(state))])
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

    def _look(self) -> None:
        """Warn about known failures, once each."""
        if not self._warned_of_width:
            params = [p.detach() for p in self._params().values()]
            self._warned_of_width = warn_of_width(params, list(core.precision_to_scale(self._precision())))
        if not self._warned_of_state:
            self._warned_of_state = any(self._warn_of_state(part) for part in self._parts(self._params()))

    def _updated(self, observations: Observations) -> list[tuple[str, Tensor, dict[str, Any]]]:
        """Return the observed parameters with their new means and states; changes nothing."""
        gradient = observations.gradient()
        if self.max_grad_norm is not None:
            clipped = core.clip_norm(list(gradient.values()), self.max_grad_norm)
            gradient = dict(zip(gradient, clipped, strict=True))
        params = self._params()
        new = []
        for part in self._parts(gradient):
            require_settings(part.settings)
            means, states = self._update(part, part.of(gradient), observations.parts)
            means = [mean.to(params[name].dtype) for name, mean in zip(part.names, means, strict=True)]
            new += list(zip(part.names, means, states, strict=True))
        return new
