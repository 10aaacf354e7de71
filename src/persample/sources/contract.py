"""The contract of every backend: what it must compute, and what it may use."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, nn

from persample.errors import OptionError
from persample.losses import as_per_sample
from persample.moments import Moments
from persample.quantities.block import Block
from persample.quantities.protocol import Quantity
from persample.sources.batch import Batch
from persample.sources.lock import Lock
from persample.sources.model.batch_norm_nodes import read_right
from persample.sources.model.calling import called, losses_of, refuse_backward_in_forward
from persample.sources.model.isolation import untouched
from persample.sources.model.modules import modules_of, parameters_of
from persample.sources.model.random_state import RandomState, random_state_restored
from persample.sources.model.recurrent_layers import repeatable
from persample.sources.model.refusals import refuse_hooked_parameters
from persample.sources.model.state import State, state_restored
from persample.sources.model.usage import Use

#: Takes a block of gradients.
Receive = Callable[[Block], None]

#: Takes quantities from the blocks of a source, for a batch: returns its losses, and the quantities.
Read = Callable[["Contract", Batch, Sequence[Quantity[Any]]], tuple[Tensor, list[Any]]]

Check = Literal["first", "always", "never"]


class Contract(ABC):
    """What the self-check and the recording need from a backend; base of `PerSampleGradSource`.

    Args:
        model: the network.
        loss_fn: the loss of each sample.
        check: when the self-check runs.
    """

    #: Whether the second moment is the exact one. A source that returns an approximation says so here.
    exact: bool = True

    #: How errors and `explain` name what the backend does with a parameter, where that is the same for all.
    method: ClassVar[str] = "per-sample gradients"

    #: Which of its machineries served the last call, for a backend that has several, and why not another.
    ran: str | None = None
    ran_because: str = ""

    #: By parameter, what gives the norms of its gradients, for a backend that has a rule of another package for them:
    #: that rule, or what stands in for it, and why.
    norms_by: Mapping[str, str] = MappingProxyType({})

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
        self.checked: set[tuple[Any, ...]] = set()
        self.moving: set[str] | None = None  # the frozen parameters that the forward pass moves, where that is known

    # What a backend implements.

    @abstractmethod
    def compute_per_sample(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the detached losses, shape `(B,)`, and the per-sample gradients, keyed as `self.parameters()`."""

    @abstractmethod
    def compute_moments(self, batch: Batch) -> Moments:
        """Return the moments of `batch`."""

    @abstractmethod
    def compute_blocks(self, batch: Batch, receive: Receive, max_bytes: int) -> Tensor:
        """Give `receive` the gradients of `batch` as blocks, and return the detached losses, shape `(B,)`.

        Each sample meets each parameter once; a parameter that the batch does not reach may be missing. The samples of
        the blocks of all parameters are the same, and ascending.
        """

    @abstractmethod
    def samples_at_once(self, batch: Batch, max_bytes: int) -> int:
        """Return how many samples a block of `compute_blocks` has; B if all parameters come as one block each."""

    def compute_quantities(self, batch: Batch, asked: Sequence[Quantity[Any]], read: Read) -> tuple[Tensor, list[Any]]:
        """Return the losses of `batch` and all that is `asked`, as `read` takes it from the blocks of a source."""
        return read(self, batch, asked)

    def reading_blocks(self) -> AbstractContextManager[None]:
        """Return the context in which quantities read blocks of this source, and passes are recorded."""
        return nullcontext()

    def refuse_unsupported(self) -> None:  # noqa: B027 - most backends have nothing to add
        """Raise `UnsupportedModelError` for what this backend visibly cannot serve, even without a batch."""

    @abstractmethod
    def find_uses(self, batch: Batch | None) -> Iterable[Use]:
        """Return what would serve each use of a parameter, on `batch` or as far as the modules alone tell.

        Raises:
            UnsupportedModelError: the model is refused as a whole.
        """

    # What a backend can use.

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that require a gradient, by name, in the model's order."""
        return parameters_of(self.model)

    def losses(self, batch: Batch, model: Callable[..., Any] | None = None) -> Tensor:
        """Run the model on `batch` and return the losses, shape `(B,)`, with their graph.

        Raises:
            BatchError: the model does not take these arguments.
            LossError: the loss is not a finite vector of length B.
            UnsupportedModelError: the model or the loss calls `.backward()`.
        """
        args, kwargs, targets = batch.for_a_call()
        with repeatable(self.model):
            outputs = called(model or self.model, args, kwargs)
        losses = losses_of(self.loss_fn, outputs, targets, batch.size)
        refuse_backward_in_forward(self.model)
        read_right([losses])
        return losses

    @contextmanager
    def with_loss(self, loss_fn: Callable[[Any, Any], Tensor], start: RandomState) -> Iterator[Self]:
        """Yield this source with another loss, inside the context, with random numbers starting from `start`.

        Nothing of what it computes remains, and no random number is used up.
        """
        other = copy.copy(self)
        other.loss_fn = loss_fn
        with (
            one_at_a_time.held(),
            untouched(self.model),
            state_restored(self.state()),
            random_state_restored(self.model, start),
            torch.enable_grad(),
        ):
            yield other

    def check_is_due(self, batch: Batch, method: str = "recording") -> bool:
        """Whether `check` says that the self-check of `check_once` is due for `batch`."""
        if self.check == "first":
            return self.kind_of(batch, method) not in self.checked
        return self.check == "always"

    def refuse_hooks(self) -> None:
        """Raise `UnsupportedModelError` if hooks on parameters would be ignored."""
        if not self.runs_parameter_hooks:
            refuse_hooked_parameters(self.model)

    def state_changed(self, state: State) -> bool:
        """Whether the model's state differs from `state`, or would after an ordinary forward pass."""
        return state.changed()

    def state(self) -> State:
        """Return what the model keeps from one forward pass to the next, as it is now."""
        return State(self.model, self._frozen())

    def _frozen(self) -> list[nn.Parameter]:
        """Return the frozen parameters that the forward pass changes, or may change."""
        if self.moving is not None and not self.moving:
            return []
        wanted = self.moving
        return [
            p for name, p in self.model.named_parameters() if not p.requires_grad and (wanted is None or name in wanted)
        ]

    def kind_of(self, batch: Batch, method: str) -> tuple[Any, ...]:
        """What must change for `check="first"` to check once more: modes, modules, hooks, parameters, kind of batch."""
        modules = modules_of(self.model)
        return (
            method,
            tuple([(id(module), type(module), module.training, _hooks(module)) for module in modules]),
            tuple([_state(name, p) for m in modules for name, p in m._parameters.items() if p is not None]),
            *[torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda")],
            batch.kind(),
        )


# The random numbers of dropout come from one generator for all threads, and a check winds it back. A call that ran in
# between would draw other numbers than it is checked with.
one_at_a_time = Lock()


def _state(name: str, parameter: nn.Parameter) -> tuple[Any, ...]:
    # By identity, because a parameter may come to be that of two modules.
    hooks = len(parameter._backward_hooks or ())
    return name, id(parameter), parameter.dtype, parameter.device, parameter.requires_grad, hooks


def _hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
