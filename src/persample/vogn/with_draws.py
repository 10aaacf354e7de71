"""How every variational optimizer draws weights, and observes gradients there."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from persample.dtypes import at_least_float32
from persample.errors import OptionError, UsageError
from persample.moments import Moments
from persample.sources.recording.recorder import ModelNotCalledError
from persample.sources.recording.results import LossReduction, Recorded
from persample.vogn import core
from persample.vogn.changed_gradients import Left, warn_of_unused, with_changes, without_dropped
from persample.vogn.distributed import Processes
from persample.vogn.loss import require_loss
from persample.vogn.observations import Observations, Observed
from persample.vogn.sampling import NoiseState, noise_from, noise_state, restored, set_noise_state, standard_noise
from persample.vogn.settings import check_generator
from persample.vogn.supported_models import refuse_replicas


class MomentSource(Protocol):
    """What gives the moments of the gradients of a batch at the weights that the model has."""

    def moments(self, inputs: Any, targets: Any) -> Moments:
        """Return the moments, as `persample.PerSampleGradSource.moments` does."""

    def recording(self, loss_reduction: LossReduction = "mean") -> Any:
        """Record passes of the user, as `persample.PerSampleGradSource.recording` does."""


class WithDraws:
    """Base of the optimizers that take gradients at draws of the weights, and put the mean back afterwards."""

    #: Whether the rule needs the moments of each draw apart, with the noise of the draw.
    keeps_draws_apart: ClassVar[bool] = False

    #: Whether gradients are taken at draws from the posterior; otherwise at its mean.
    draws_for_training: ClassVar[bool] = True

    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor] | None
    source: MomentSource
    mc_samples: int
    generator: torch.Generator | None
    loss_reduction: LossReduction
    steps: int
    skipped_steps: int
    _observations: Observations
    _drawn: bool
    _left: Left | None
    _used: Mapping[str, Tensor]
    _warned_of_gradients: bool
    _processes: Processes | None

    @abstractmethod
    def _params(self) -> dict[str, Tensor]:
        """All trained parameters by name, in the order of the groups."""

    @abstractmethod
    def _follow_model(self) -> None:
        """Take notice of what changed in the model, and refuse what cannot be followed."""

    @abstractmethod
    def _precision(self) -> list[Tensor]:
        """The precision of the posterior over all trained parameters, in that order."""

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
            UsageError: called inside `sampled_params()`; `mc_samples` was changed before `redraw=False`; the optimizer
                has no loss; or a parameter was replaced or resized since it was made.
            PersampleError: whatever the source refuses.

        If it raises, what was observed before stays, and nothing is added to it.
        """
        require_loss(self.loss_fn, "observe()")
        observations = self._observations
        earlier = [] if redraw else observations.draws
        if earlier and len(earlier) != self.mc_samples:
            raise UsageError(
                f"There were {len(earlier)} draws since the last step and mc_samples is {self.mc_samples}, so "
                "redraw=False cannot take the draws of the time before: leave both as they are between steps."
            )
        draws, losses = [], []
        generator = self._training_noise()
        with self._draws("observe()", generator, noisy=self.draws_for_training) as draw_weights:
            for index in range(self.mc_samples):
                draws.append(earlier[index] if earlier else self._noise_state(generator))
                with noise_from(draws[index], generator) if earlier else nullcontext():
                    noise = draw_weights()
                moments = self._own_moments(self.source.moments(inputs, targets))
                losses.append(moments.losses.mean())
                place = len(observations.parts) - self.mc_samples + index if earlier else None
                observations = self._with_more(observations, Observed(moments, noise), place)
        self._observations = replace(observations, draws=draws)
        return torch.stack(losses).mean()

    @contextmanager
    def sampled_params(
        self,
        train: bool = False,
        *,
        loss_reduction: LossReduction | None = None,
        grad_scaler: Any = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[None]:
        """Let the model have one draw of its weights inside a `with` block; afterwards it has its mean again.

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
            loss_reduction: how the losses of the samples were reduced to a scalar, "mean" (over all samples that the
                model was called with) or "sum"; None is the optimizer's own.
            grad_scaler: the `torch.amp.GradScaler` that scaled the loss, whose scale is taken out before squaring.
            generator: source of the noise; None is the optimizer's own.

        Raises:
            UsageError: called inside another `sampled_params()`; or nothing was recorded, or passes cannot be told
                apart, or the backend runs the model itself (its error names another way).
            PersampleError: whatever the source refuses.

        If it raises, what was observed before stays, and nothing is added to it.
        """
        check_generator("generator", generator)
        if grad_scaler is not None and not callable(getattr(grad_scaler, "get_scale", None)):
            raise OptionError(f"grad_scaler={grad_scaler!r}: must be the torch.amp.GradScaler that scales the loss.")
        noisy = self.draws_for_training or not train
        generator = generator or (self._training_noise() if train else self.generator)
        if train and not self._drawn:
            self._follow_model()
            self._take_changes(at_the_step=False)
        with self._draws("sampled_params()", generator, noisy=noisy) as draw_weights:
            draws = [self._noise_state(generator)]
            noise = draw_weights()
            if not train:
                yield
                return
            with (
                refuse_replicas(self.model, several_processes=not self.keeps_draws_apart),
                self.source.recording(loss_reduction or self.loss_reduction) as recorded,
            ):
                yield
            self._add_recorded(recorded, grad_scaler, noise)
            self._observations = replace(self._observations, draws=draws)

    def _add_recorded(self, recorded: Recorded, grad_scaler: Any, noise: Mapping[str, Tensor] | None) -> None:
        scale = 1.0 if grad_scaler is None else grad_scaler.get_scale()
        observed = Observed(self._own_moments(recorded.moments(scale)), noise)
        params = self._params()
        # The first block's gradients are looked at by the second, or by the step, which also knows whether a gradient
        # scaler has divided by its scale.
        if scale == 1 and self._observations.parts:
            alone = Left.by(recorded, scale, None)
            changed, left = with_changes(Observations([observed]), alone, params, unscaled=False, final=True)
            observed, recorded.left = changed.parts[0], left.gradients
        observations = self._with_more(self._observations, observed, None)
        if grad_scaler is None:
            observations = replace(observations, without_scaler=True)
        self._left = Left.by(recorded, scale, self._left if self._observations.parts else None)
        self._observations = observations

    def _take_changes(self, *, at_the_step: bool) -> None:
        """Take over what the user made of `p.grad` since the last block.

        Raises:
            UsageError: what it means cannot be told.
        """
        params = {name: p for name, p in self._params().items() if p.requires_grad}
        if at_the_step and not self._observations.parts:
            return
        if self._left is None or not self._observations.parts:
            self._warned_of_gradients = self._warned_of_gradients or warn_of_unused(params, self._used)
            return
        unscaled = hasattr(self, "found_inf") and getattr(self, "grad_scale", None) is None
        self._observations, self._left = with_changes(
            self._observations, self._left, params, unscaled=unscaled, final=at_the_step
        )
        if at_the_step:
            self._observations = without_dropped(
                self._observations, self._left, params, several_processes=self._processes is not None
            )
            self._used = self._left.gradients

    def _observe_closure(self, closure: Callable[[], Any]) -> Any:
        """Call a closure that runs forward and backward at `mc_samples` draws; return its loss, averaged over them.

        One that does nothing leaves all as it is: trainers hand one to every step, also where passes were recorded
        before.
        """
        before, losses = self._observations, []
        generator = self._training_noise()
        noise = self._noise_state(generator)
        try:
            for _ in range(self.mc_samples):
                with self.sampled_params(train=True), torch.enable_grad():
                    losses.append(closure())
        except ModelNotCalledError:
            self._observations = before
            if losses != [None] or not (before.parts or self._processes is not None):
                raise
            set_noise_state(noise, generator)
            return None
        except BaseException:
            self._observations = before
            raise
        if any(loss is None for loss in losses):
            return None
        return sum(loss.detach() if isinstance(loss, Tensor) else loss for loss in losses) / len(losses)

    def _with_more(self, observations: Observations, observed: Observed, place: int | None) -> Observations:
        """Add to the part at `place`; if that is None, as another draw."""
        if not self.keeps_draws_apart:
            place = 0 if observations.parts else None
        return observations.with_more(observed, place)

    @contextmanager
    def _draws(
        self, call: str, generator: torch.Generator | None, *, noisy: bool = True
    ) -> Iterator[Callable[[], Mapping[str, Tensor] | None]]:
        """Yield a function that gives the parameters a new draw; afterwards they have their mean again.

        It returns the noise, by name, where the rule needs that. Unless `noisy`, the draws are the mean itself.
        """
        self._follow_model()
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

    def _noise_state(self, generator: torch.Generator | None) -> NoiseState:
        return noise_state(generator, {p.device for p in self._params().values()})

    def _training_noise(self) -> torch.Generator | None:
        """Where the noise of this step comes from."""
        if self._processes is None or self.generator is None:
            return self.generator
        return self._processes.noise(self.generator.initial_seed(), self.steps + self.skipped_steps)

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
