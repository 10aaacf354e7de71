"""`PerSampleGradSource`: the contract of every backend, and the parts of it that all backends share."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from persample.errors import DisagreementError, OptionError, UnsupportedModelError
from persample.losses import as_per_sample
from persample.moments import Moments
from persample.sources.batch import Batch, as_batch
from persample.sources.lock import Lock
from persample.sources.model.autograd_graph import nodes_behind, variables_of
from persample.sources.model.batch_norm_nodes import read_right
from persample.sources.model.calling import called, losses_of
from persample.sources.model.eager import uncompiled
from persample.sources.model.isolation import State, parameters_counted, parameters_guarded, state_restored, untouched
from persample.sources.model.modules import modules_of
from persample.sources.model.random_state import RandomState, random_state, random_state_restored
from persample.sources.model.refusals import refuse_hooked_parameters, refuse_impossible
from persample.sources.model.usage import Use
from persample.sources.recording.replay import ReplayRecorder
from persample.sources.recording.results import LossReduction, Recorded
from persample.sources.selfcheck.oracle import losses_of_part, refuse_backward_in_forward, refuse_hidden_uses
from persample.sources.selfcheck.raw_errors import in_words
from persample.sources.selfcheck.returned import moments_of, per_sample_of, uses_of
from persample.sources.selfcheck.rounding import only_rounded
from persample.sources.selfcheck.verify import refuse_nonlinear_backward, refuse_slight_mixing, verify, verify_unmixed

Check = Literal["first", "always", "never"]


class PerSampleGradSource(ABC):
    """Per-sample gradients of a model's loss.

    A backend is a subclass that implements `compute_per_sample`, and `compute_moments` where it can do better than
    to average per-sample gradients. Everything else (the shape of a batch, what is refused, the self-check, leaving
    no trace) is done here, the same for all. During both methods gradients are enabled, every `p.grad` is None, and
    whatever they leave on the model is taken off again afterwards.

    Args:
        model: the network. Neither it nor its parameters are changed.
        loss_fn: `loss_fn(outputs, targets)` returns the loss of each sample, shape `(B,)`; a loss module of
            `torch.nn` is accepted too (see `persample.losses.as_per_sample`).
        check: when the self-check compares this backend with ordinary gradients and, for a few samples, with the
            loop over samples: on the `"first"` batch of its kind (default), `"always"`, or `"never"`.
    """

    #: Whether the second moment is the exact one. A source that returns an approximation says so here.
    exact: bool = True

    #: How errors and `explain` name what the backend does with a parameter, where that is the same for all.
    method: ClassVar[str] = "per-sample gradients"

    #: Which of its machineries served the last call, for a backend that has several, and why not another.
    ran: str | None = None
    ran_because: str = ""

    #: Whether autograd itself gives every parameter the gradient of each sample, so that hooks on parameters take part.
    runs_parameter_hooks: ClassVar[bool] = False

    #: Whether the model's random numbers (dropout) are those of one ordinary forward pass over the batch.
    ordinary_random_stream: ClassVar[bool] = True

    #: Whether the state that is left on the model (buffers, attributes) is that of one ordinary forward pass over the
    #: batch. If not, such a pass is run for it wherever the state has changed.
    ordinary_state: bool = False

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any, Any], Any], *, check: Check = "first") -> None:
        if not isinstance(model, nn.Module):
            raise OptionError(f"model is of type {type(model).__name__}: pass a torch.nn.Module.")
        if check not in get_args(Check):
            raise OptionError(f"check={check!r} is not known: use one of {', '.join(map(repr, get_args(Check)))}.")
        self.model = model
        self.loss_fn = as_per_sample(loss_fn)
        self.check = check
        self._checked: set[tuple[Any, ...]] = set()
        self._moving: set[str] | None = None  # the frozen parameters that the forward pass moves, where that is known

    # What users call.

    def moments(self, inputs: Any, targets: Any) -> Moments:
        """Return the mean gradient and the mean squared gradient of the single samples.

        Args:
            inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments of the model; dim 0 of
                every tensor is the sample, unless `persample.shared` or `persample.batched` say otherwise. A list of B
                entries, not all of them tensors of B entries, has one for each sample.
            targets: what `loss_fn` takes as second argument; the same holds of it.

        Returns:
            `Moments`, keyed by the names of the parameters that require a gradient, in the order of
            `model.named_parameters()`. A parameter that the batch does not reach has zeros.

        Raises:
            BatchError: inputs and targets are not a mini-batch.
            LossError: the loss is not a finite vector of length B.
            UnsupportedModelError: a part of the model has no per-sample gradient, or not with this backend.
            DisagreementError: the self-check found that the result is wrong, or the backend returned something else
                than its contract asks for.
        """
        moments: Moments = self._run(inputs, targets, moments_of)
        return moments

    def per_sample(self, inputs: Any, targets: Any) -> dict[str, Tensor]:
        """Return the gradient of the loss of each sample, `{name: (B, *parameter.shape)}`.

        Arguments, keys and errors are those of `moments`.
        """
        gradients: dict[str, Tensor]
        _, gradients = self._run(inputs, targets, per_sample_of)
        return gradients

    def uses(self, inputs: Any = None, targets: Any = None) -> list[Use]:
        """Return what would serve each use of a parameter, without computing a gradient of the model.

        Args:
            inputs: a mini-batch, as for `moments`, on which the forward pass is run; nothing of that remains. None
                to go by what can be seen of the modules alone.
            targets: its targets.

        Returns:
            The uses in the order of the forward pass, or without a batch of the modules. That of the parameter None
            is a refusal of the whole model.

        Raises:
            BatchError: inputs and targets are not a mini-batch.
            LossError: the loss is not a finite vector of length B.
        """
        found: list[Use] = []
        try:
            self.refuse_hooks()
            if inputs is None:
                found += uses_of(self, None)
            else:
                batch = as_batch(inputs, targets, self.model)
                refuse_impossible(self.model)
                start = random_state(self.model)
                with (
                    batch.doubted(),
                    _one_at_a_time.held(),
                    untouched(self.model) as state,
                    parameters_guarded(self.model),
                    state_restored(self.state()),
                    parameters_counted(self.model),
                    random_state_restored(self.model, start),
                    torch.enable_grad(),
                    uncompiled(),
                    in_words(self, batch, state),
                ):
                    found += uses_of(self, batch)
                    verify_unmixed(self, batch, start)
                    if self.parameters().keys() - {use.parameter for use in found}:
                        refuse_hidden_uses(self, batch.rows(slice(0, 2)))
        except UnsupportedModelError as refusal:
            found.append(Use(None, "refused", "the model", "", str(refusal)))
        return found

    @contextmanager
    def recording(self, loss_reduction: LossReduction = "mean") -> Iterator[Recorded]:
        """Record the moments of forward and backward passes that the user runs himself, inside a `with` block.

            with source.recording() as recorded:
                loss = torch.nn.functional.cross_entropy(model(inputs), targets)
                loss.backward()
            moments = recorded.moments()

        The model is called as a whole, and `backward()` after each call of it. Dim 0 of its tensor arguments is the
        sample. `loss_fn` is not used. `p.grad` gets the gradient, as ever.

        Args:
            loss_reduction: how the losses of the samples were reduced to a scalar, `"mean"` or `"sum"`. A mean is one
                over all samples that the model was called with.

        Raises:
            UsageError: nothing was recorded, or backward passes cannot be told apart.
            UnsupportedModelError: a part of the model has no per-sample gradient, or not with this backend; or the
                forward pass cannot be repeated, by a backend that runs the model itself.
        """
        with ReplayRecorder(self, loss_reduction) as recorder:
            yield recorder.recorded

    # What a backend implements.

    @abstractmethod
    def compute_per_sample(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the detached losses, shape `(B,)`, and the per-sample gradients, keyed as `self.parameters()`."""

    def compute_moments(self, batch: Batch) -> Moments:
        """Return the moments of `batch`; here as averages over `compute_per_sample`."""
        losses, gradients = per_sample_of(self, batch)
        return Moments(
            losses=losses,
            mean={name: g.mean(0) for name, g in gradients.items()},
            second_moment={name: g.square().mean(0) for name, g in gradients.items()},
        )

    def refuse_unsupported(self) -> None:  # noqa: B027 - most backends have nothing to add
        """Raise `UnsupportedModelError` for what can be seen, without a batch, to be beyond this backend."""

    def find_uses(self, batch: Batch | None) -> Iterable[Use]:
        """Return what would serve each use of a parameter: see `uses`, which asks for it.

        Backends that go by layers or operations tell each of them. Here it is found out by trying two samples.

        Raises:
            UnsupportedModelError: the model is refused as a whole.
        """
        self.refuse_unsupported()
        names = list(self.parameters())
        if batch is not None:
            losses = self.losses(batch)
            reached = variables_of(nodes_behind(losses))
            names = [name for name, p in self.parameters().items() if p in reached]
            few = batch.rows(slice(0, 2))
            losses_of_part(self, few)
            moments_of(self, few)
        return [Use(name, "rule", self.method, "") for name in names]

    # What a backend can use.

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that require a gradient, by name, in the model's order."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def losses(self, batch: Batch, model: Callable[..., Any] | None = None) -> Tensor:
        """Run the model on `batch` and return the losses, shape `(B,)`, with their graph.

        Raises:
            BatchError: the model does not take these arguments.
            LossError: the loss is not a finite vector of length B.
            UnsupportedModelError: the model or the loss calls `.backward()`.
        """
        args, kwargs, targets = batch.for_a_call()
        outputs = called(model or self.model, args, kwargs)
        losses = losses_of(self.loss_fn, outputs, targets, batch.size)
        refuse_backward_in_forward(self.parameters())
        read_right([losses])
        return losses

    def check_once(self, batch: Batch, loss_fn: Callable[[Any, Any], Tensor]) -> None:
        """Run the self-check on `batch` with another loss, where `check` says that it is due for its kind.

        Nothing remains of it, no random number is used up.

        Raises:
            DisagreementError, UnsupportedModelError: what the self-check found.
        """
        if not self.check_is_due(batch):
            return
        self._moving = None
        with self.with_loss(loss_fn, random_state(self.model)) as checked:
            checked._compute_and_look(batch, moments_of, checked.state(), checking=True)
        self._moving = checked._moving
        if batch.size > 1:
            self._checked.add(self._kind(batch, "recording"))

    @contextmanager
    def with_loss(self, loss_fn: Callable[[Any, Any], Tensor], start: RandomState) -> Iterator[PerSampleGradSource]:
        """Yield this source with another loss, for use inside the context, where random numbers begin at `start`.

        Nothing of what it computes remains, and no random number is used up.
        """
        other = copy.copy(self)
        other.loss_fn = loss_fn
        with (
            _one_at_a_time.held(),
            untouched(self.model),
            state_restored(self.state()),
            random_state_restored(self.model, start),
            torch.enable_grad(),
        ):
            yield other

    def check_is_due(self, batch: Batch) -> bool:
        """Whether `check` says that the self-check of `check_once` is due for `batch`."""
        if self.check == "first":
            return self._kind(batch, "recording") not in self._checked
        return self.check == "always"

    def _run(self, inputs: Any, targets: Any, compute: _Compute) -> Any:
        batch = as_batch(inputs, targets, self.model)
        refuse_impossible(self.model)
        self.refuse_hooks()
        self.refuse_unsupported()
        kind = self._kind(batch, compute.__name__) if self.check == "first" else ()
        checking = self.check == "always" or (self.check == "first" and kind not in self._checked)
        if checking:
            self._moving = None
        with (
            batch.doubted(),
            _one_at_a_time.held(),
            untouched(self.model, self._frozen()) as state,
            torch.enable_grad(),
            uncompiled(),
            in_words(self, batch, state),
        ):
            if checking or not self.ordinary_state or self._moving is None:
                result = self._compute_and_look(batch, compute, state, checking)
            else:
                result = compute(self, batch)
            if batch.size > 1:  # a batch of one cannot show that samples are mixed
                self._checked.add(kind)
            return result

    def refuse_hooks(self) -> None:
        """Raise `UnsupportedModelError` if hooks on parameters would not take part."""
        if not self.runs_parameter_hooks:
            refuse_hooked_parameters(self.model)

    def _compute_and_look(self, batch: Batch, compute: _Compute, state: State, checking: bool) -> Any:
        """Compute, see to the state, and check the result, if it is to be checked.

        Args:
            batch: the batch.
            compute: what is asked for.
            state: that of the model before.
            checking: whether the self-check is due.
        """
        before = random_state(self.model)
        with parameters_counted(self.model), parameters_guarded(self.model) if checking else nullcontext():
            result = compute(self, batch)
            if not self.ordinary_state and self.state_changed(state):
                state.put_back()
                with random_state_restored(self.model, before):
                    self.losses(batch)
        if self._moving is None:
            moved = {id(p) for p in state.moved()}
            self._moving = {name for name, p in self.model.named_parameters() if id(p) in moved}
        if checking:
            with state_restored(self.state()):
                state.put_back()  # the check repeats the forward pass from where it began
                try:
                    verify(self, batch, result, before)
                except DisagreementError as disagreement:
                    if not only_rounded(self, batch, compute, result, before):
                        refuse_nonlinear_backward(self, batch, before)
                        refuse_slight_mixing(self, batch, before)
                        with random_state_restored(self.model, before):
                            self._refuse_uses(batch, disagreement)
                        raise
        return result

    def _refuse_uses(self, batch: Batch, disagreement: DisagreementError) -> None:
        """Raise `UnsupportedModelError` if one of the uses of parameters is refused when they are looked at one by one.

        It is the reason why the result is wrong. The look costs more than a call, so each call does without it.
        """
        for use in uses_of(self, batch):
            if use.kind == "refused":
                raise UnsupportedModelError(use.why) from disagreement

    def state_changed(self, state: State) -> bool:
        """Whether the model's state is another one than `state`, or would be after an ordinary forward pass."""
        return state.changed()

    def state(self) -> State:
        """Return what the model keeps from one forward pass to the next, as it is now."""
        return State(self.model, self._frozen())

    def _frozen(self) -> list[nn.Parameter]:
        """Return the frozen parameters that the forward pass moves, or may move as far as is known."""
        if self._moving is not None and not self._moving:
            return []
        wanted = self._moving
        return [
            p for name, p in self.model.named_parameters() if not p.requires_grad and (wanted is None or name in wanted)
        ]

    def _kind(self, batch: Batch, method: str) -> tuple[Any, ...]:
        """What must change for `check="first"` to check once more: modes, modules, hooks, parameters, kind of batch."""
        modules = modules_of(self.model)
        return (
            method,
            tuple([(id(module), type(module), module.training, _hooks(module)) for module in modules]),
            tuple([_state(name, p) for m in modules for name, p in m._parameters.items() if p is not None]),
            *[torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda")],
            batch.kind(),
        )


#: `moments_of` or `per_sample_of`.
_Compute = Callable[[PerSampleGradSource, Batch], Any]

# The random numbers of dropout come from one generator for all threads, and a check winds it back. A call that ran in
# between would draw other numbers than it is checked with.
_one_at_a_time = Lock()


def _state(name: str, parameter: nn.Parameter) -> tuple[Any, ...]:
    # By identity, because a parameter may come to be that of two modules.
    hooks = len(parameter._backward_hooks or ())
    return name, id(parameter), parameter.dtype, parameter.device, parameter.requires_grad, hooks


def _hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
