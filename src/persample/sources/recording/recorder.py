"""Recording the user's forward and backward passes: where they begin and end, and which belong together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from persample.errors import OptionError, UnsupportedModelError, UsageError
from persample.quantities.computed import Quantities
from persample.quantities.groups import as_groups
from persample.sources.batch import Batch, split_batch
from persample.sources.contract import Contract
from persample.sources.model.autograd_graph import nodes_from, outer_backward, variables_of
from persample.sources.model.batch_norm_nodes import read_right
from persample.sources.model.eager import refuse_compiled, uncompiled
from persample.sources.model.refusals import VMAP_OR_VJP
from persample.sources.recording.errors import ModelNotCalledError, NothingRecordedError, earlier_pass, second_pass
from persample.sources.recording.forward_pass import ForwardPass, tensors_of
from persample.sources.recording.outputs_check import check_outputs
from persample.sources.recording.p_grad import copied, gradients_in, is_changed
from persample.sources.recording.reduction import (
    divisor_of,
    refuse_joint_loss,
    refuse_other_reduction,
    refuse_weighted_mean,
)
from persample.sources.recording.reduction_warnings import warn_of_divisor, warn_of_samples
from persample.sources.recording.results import LossReduction, Recorded, Sums, Wanted, unknown_losses
from persample.sources.selfcheck.oracle import reentrant_refused
from persample.sources.selfcheck.rounds import Reading
from persample.sources.splits.detection import unwrapped


class Recorder(TorchFunctionMode):
    """Records the user's calls of a model and of `backward()`, inside a `with` block.

    A backend's subclass says what to do when a forward pass begins and ends, and what a backward pass gave.

    Args:
        model: the network.
        parameters: those to record, by name.
        reduction: how the user reduces the losses.
        wanted: the quantities that are wanted of the gradients, beside the moments.

    Raises:
        OptionError: `reduction` is not known.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        reduction: LossReduction,
        wanted: Wanted = Wanted(),  # noqa: B008 - it cannot be changed
    ) -> None:
        super().__init__()
        if reduction not in get_args(LossReduction):
            raise OptionError(f'loss_reduction={reduction!r} must be "mean" or "sum".')
        self.model = model
        self.recorded = Recorded(reduction, parameters, wanted, loss_scale=wanted.loss_scale)
        self.passes: list[ForwardPass] = []
        self.gradients: dict[str, Tensor] = {}
        self.in_backward = False
        self._in_outer_backward: Callable[[], bool] = lambda: True
        self._aside = False
        self._reached = False
        self._depth = 0
        self._handles: list[RemovableHandle] = []
        self._eagerly = ExitStack()

    # What a backend implements.

    def begin(self, forward_pass: ForwardPass) -> None:
        """A forward pass begins."""

    def end(self, forward_pass: ForwardPass, outputs: list[Tensor]) -> None:
        """A forward pass has ended with these outputs, as far as they are tensors."""

    def before_backward(self, losses: Sequence[Tensor]) -> AbstractContextManager[Any]:
        """A backward pass from `losses` begins; return a context to run it in."""
        return nullcontext()

    @abstractmethod
    def after_backward(self, forward_pass: ForwardPass) -> Sums:
        """Return the results of a backward pass for its forward pass."""

    def quantities(self, forward_pass: ForwardPass) -> Sequence[Any]:
        """Return what `after_backward` has found of each quantity that is wanted; those that ask for none have none."""
        return ()

    def left_out(self) -> Iterable[str]:
        """Return the parameters that got a gradient from a backward pass outside any recorded forward pass."""
        return ()

    def run_backward(self, *args: Any, **kwargs: Any) -> None:
        """Run autograd's backward pass."""
        torch.autograd.backward(*args, **kwargs)

    # What a backend can use.

    def remember_state(self, source: Contract, forward_pass: ForwardPass) -> None:
        """Keep the state of the model for the self-check of `source`, which repeats the pass that begins now."""
        if source.check_is_due(forward_pass.batch, self.method):
            forward_pass.state = source.state()

    def reading(self, forward_pass: ForwardPass, *, sums: bool = True) -> Reading | None:
        """Return what reads the blocks of rows of a backward pass for the quantities that are wanted; None if none is.

        Args:
            forward_pass: to which the backward pass belongs.
            sums: whether to add up what is in the blocks, and their squares.
        """
        wanted, groups = self.recorded.wanted, forward_pass.groups
        if not wanted.quantities:
            return None
        factor = wanted.factor(self.recorded.reduction, forward_pass.batch.size)
        size = forward_pass.batch.size if groups is None else len(groups)
        return Reading(wanted.quantities, self.recorded.parameters, size, factor=factor, groups=groups, sums=sums)

    def reach(self, forward_pass: ForwardPass) -> None:
        """Note that a backward pass goes through `forward_pass`.

        Raises:
            UsageError: it went through an earlier one, or went through this one before, or was not seen to begin.
            UnsupportedModelError: it began inside of the model.
        """
        if not self.in_backward and self.current is not None:
            raise UnsupportedModelError(
                "The model computes gradients itself (torch.autograd.grad in its forward pass), which this backend "
                f"would mistake for those of the loss: {VMAP_OR_VJP}."
            )
        if not self.in_backward:
            raise UsageError("A backward pass began in a way that cannot be seen: call loss.backward() on the loss.")
        if forward_pass.done:
            raise second_pass()
        if forward_pass is not self.passes[-1]:
            raise earlier_pass()
        self._reached = True

    @property
    def method(self) -> str:
        """By what name the self-check remembers that this was checked."""
        asked = self.recorded.wanted.quantities
        by_group = ["by group"] if self.recorded.wanted.groups is not None else []
        return " ".join(["recording", *by_group, *(type(quantity).__qualname__ for quantity in asked)])

    @property
    def current(self) -> ForwardPass | None:
        """The forward pass that is running, if any."""
        return self.passes[-1] if self._depth > 0 and self.passes else None

    @property
    def watches_calls(self) -> bool:
        """Whether calls of the model and of its layers are the user's, and not part of a backward pass or a check."""
        return not self.in_backward and not self._aside

    @property
    def watches_gradients(self) -> bool:
        """Whether gradients are those of the user's backward pass, and not of one inside of it or of a check."""
        return not self._aside and (not self.in_backward or self._in_outer_backward())

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run the model, and backward passes, without recording them."""
        self._aside = True
        try:
            yield
        finally:
            self._aside = False

    @contextmanager
    def with_gradients(self) -> Iterator[None]:
        """Keep the ordinary gradient of each parameter in the next backward pass as `gradients`, by name."""
        self.gradients = {}

        def hook_for(name: str) -> Callable[[Tensor], None]:
            def hook(gradient: Tensor) -> None:
                self.gradients[name] = gradient.detach().to_dense().clone()

            return hook

        handles = [p.register_hook(hook_for(name)) for name, p in self.recorded.parameters.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def hold(self, *handles: RemovableHandle) -> None:
        """Remove these hooks when the recording ends."""
        self._handles += handles

    # Inner workings.

    def __enter__(self) -> Recorder:
        refuse_compiled("recording()")
        self.hold(
            self.model.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True),
            self.model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
        )
        self._eagerly.enter_context(uncompiled())
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        self._eagerly.close()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if error is None:
            self._finish()
        elif self.passes:
            self.passes[-1].batch.add_doubts(error)

    def _finish(self) -> None:
        if not self.recorded.sums and not self.passes:
            raise ModelNotCalledError
        if not self.recorded.sums:
            raise NothingRecordedError(
                "Nothing was recorded, because the model was called, but no backward pass followed: call "
                "loss.backward() inside the block, on a loss computed from the outputs of the model."
            )
        if self.recorded.reduction == "mean":
            warn_of_samples(self.passes)
            if self.recorded.loss_scale is None:
                warn_of_divisor(self.passes)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward or func is torch.autograd.backward:
            return self._backward(*args, **kwargs)
        if func is torch.autograd.grad:
            self._refuse_gradients(*args, **kwargs)
        return self.operation(func, types, args, kwargs)

    def operation(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run any other operation."""
        return func(*args, **kwargs)

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._depth += 1
        if self._depth > 1 or not self.watches_calls or not torch.is_grad_enabled():
            return unwrapped((args, kwargs))
        with torch._C.DisableTorchFunction():
            batch = split_batch(args, kwargs, None)
            kinds = {p.device.type for p in self.recorded.parameters.values()}
            autocast = {kind: torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}
            numbered = Batch.of((*batch.inputs(), torch.arange(batch.size)), batch.size)
            groups = self.recorded.wanted.groups
            of_pass = None if groups is None else as_groups(groups, batch.size)
            self.passes.append(ForwardPass(numbered, of_pass, autocast))
            self.begin(self.passes[-1])
        return unwrapped((args, kwargs))

    def _after_forward(self, module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        self._depth -= 1
        if self._depth > 0 or not self.watches_calls or not torch.is_grad_enabled() or outputs is None:
            return
        forward_pass = self.passes[-1]
        tensors = tensors_of(outputs)
        with torch._C.DisableTorchFunction():
            forward_pass.edges = {i: get_gradient_edge(t) for i, t in enumerate(tensors) if t.requires_grad}
            forward_pass.hooks = [t._backward_hooks for t in tensors if t._backward_hooks]
            forward_pass.outputs = [i for i, t in enumerate(tensors) if _is_of_samples(t, forward_pass.batch.size)]
            for i, edge in forward_pass.edges.items():
                # On the node: a hook on the tensor itself could be one of the user's, which layers' backends refuse.
                self.hold(edge.node.register_prehook(self._output_hook(forward_pass, i, edge.output_nr)))
            self.end(forward_pass, tensors)

    def _output_hook(
        self, forward_pass: ForwardPass, index: int, place: int
    ) -> Callable[[tuple[Tensor | None, ...]], None]:
        def hook(deltas: tuple[Tensor | None, ...]) -> None:
            delta = deltas[place]
            if delta is not None and self.watches_gradients:
                self.reach(forward_pass)
                with torch._C.DisableTorchFunction():
                    forward_pass.receive(index, delta)

        return hook

    def _backward(
        self,
        losses: Any,
        gradient: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
        **others: Any,
    ) -> None:
        gradient = others.pop("grad_tensors", gradient)
        if inputs is not None or create_graph or others:
            raise UsageError(
                "backward() was called with inputs= or create_graph=, which cannot be recorded: call loss.backward()."
            )
        self._reached = False
        self._refuse_changed_between()
        roots = (losses,) if isinstance(losses, Tensor) else tuple(losses)
        self._look_at_roots(roots)
        context = self.before_backward(roots)
        self.in_backward = True
        try:
            with context, outer_backward(roots) as self._in_outer_backward, reentrant_refused():
                self.run_backward(losses, gradient, retain_graph=retain_graph)
        finally:
            self.in_backward = False
        if not self._reached:
            self._refuse_left_out()
            return
        forward_pass = self.passes[-1]
        forward_pass.done = True
        with torch.no_grad():
            self.recorded.sums.append(self.after_backward(forward_pass))
            if asked := self.recorded.wanted.quantities:
                losses = unknown_losses(forward_pass.batch.size, self.recorded.parameters)
                numbers = None if forward_pass.groups is None else forward_pass.groups.numbers
                self.recorded.quantities.append(Quantities(losses, asked, self.quantities(forward_pass), numbers))
            self.recorded.left = self._left_by(forward_pass, self.recorded.sums[-1])

    def _look_at_roots(self, roots: Sequence[Tensor]) -> None:
        with torch._C.DisableTorchFunction():
            if self.passes:
                self._refuse_other_passes(roots)
                self._look_at_reduction(roots, self.passes[-1])
                read_right(roots)
            elif self._own(variables_of(nodes_from(loss.grad_fn for loss in roots))):
                raise ModelNotCalledError

    def _refuse_left_out(self) -> None:
        for name in self.left_out():
            raise UsageError(
                f"A backward pass gave {name!r} a gradient without going through a call of the model, which would be "
                "ignored. Call the model itself, not its parts; add a penalty on the weights by penalty.backward() "
                "after the block, before step()."
            )

    def _left_by(self, forward_pass: ForwardPass, sums: Sums) -> dict[str, Tensor]:
        """What is in `p.grad` after the backward pass through `forward_pass`."""
        if forward_pass.added:
            return copied(gradients_in(self.recorded.parameters))
        return {name: total.to(self.recorded.parameters[name].dtype) for name, total in sums.total.items()}

    def _refuse_changed_between(self) -> None:
        """Raise if `p.grad` was changed between two backward passes, and not emptied.

        Raises:
            UsageError: it was.
        """
        with torch._C.DisableTorchFunction():
            present = gradients_in(self.recorded.parameters) if self.recorded.sums else {}
            if any(bool(g.any()) for g in present.values()) and is_changed(present, self.recorded.left):
                raise UsageError(
                    "p.grad was changed between two backward passes of one block, which the per-sample sums do not "
                    "include: change it after the last one."
                )

    def _refuse_gradients(self, outputs: Any, inputs: Any = (), *_: Any, **__: Any) -> None:
        """Raise if `torch.autograd.grad` is called outside the model on something that depends on it.

        Raises:
            UsageError: it is.
        """
        if self._depth > 0 or not self.watches_calls:
            return
        with torch._C.DisableTorchFunction():
            stop = {edge.node for p in self.passes for edge in p.edges.values()}
            nodes = nodes_from([t.grad_fn for t in tensors_of(outputs)], stop=stop)
            through = not nodes.isdisjoint(stop) or self._own([*variables_of(nodes), *tensors_of(inputs)])
        if through:
            raise UsageError(
                "torch.autograd.grad was called on what depends on the model, and such a backward pass cannot be "
                "recorded. For gradients of the parameters call loss.backward(), and read p.grad after the block. "
                "Compute derivatives by inputs (a residual, a gradient penalty) in the model's forward(), return "
                "them, and use optimizer.observe(inputs, targets)."
            )

    def _own(self, tensors: Iterable[Tensor]) -> bool:
        """Whether a recorded parameter is among `tensors`."""
        return not {id(p) for p in self.recorded.parameters.values()}.isdisjoint(map(id, tensors))

    def _refuse_other_passes(self, losses: Sequence[Tensor]) -> None:
        pass_of = {edge.node: p for p in self.passes for edge in p.edges.values()}
        for node in nodes_from((loss.grad_fn for loss in losses), stop=pass_of):
            if node in pass_of and pass_of[node].done:
                raise second_pass()
            if node in pass_of and pass_of[node] is not self.passes[-1]:
                raise earlier_pass()

    def _look_at_reduction(self, losses: Sequence[Tensor], forward_pass: ForwardPass) -> None:
        forward_pass.added = any(p.grad is not None for p in self.recorded.parameters.values())
        for loss in losses:
            forward_pass.divisor = divisor_of(loss)
            refuse_other_reduction(loss, self.recorded.reduction, forward_pass.batch.size)

    def refuse_unseparable(self, losses: Sequence[Tensor], source: Contract) -> None:
        """Raise if a loss is no sum, or mean, over the samples of the last forward pass, as far as this can be seen.

        Raises:
            UsageError: it is a mean over other things than the samples.
            UnsupportedModelError: it mixes the samples.
        """
        if not self.passes:
            return
        forward_pass = self.passes[-1]
        with self.aside(), torch._C.DisableTorchFunction(), forward_pass.without_hooks():
            for loss in losses:
                edges = [forward_pass.edges[index] for index in forward_pass.outputs]
                if self.recorded.reduction == "mean":
                    refuse_weighted_mean(loss, edges, forward_pass.batch.size)
                if source.check_is_due(forward_pass.batch, self.method):
                    refuse_joint_loss(loss, edges, forward_pass.batch.size)

    def check(self, source: Contract, forward_pass: ForwardPass) -> None:
        """Run the self-check of `source` on the batch of a forward pass, with a loss that is linear in the outputs.

        If it refuses the model, the outputs that the user's loss does not depend on are left out: they may mix the
        samples, as the similarities do that contrastive models return.
        """
        reached = [index for index in forward_pass.outputs if index in forward_pass.reached]
        of_these = f"{self.method} of outputs {reached}"
        if not source.check_is_due(forward_pass.batch, of_these):
            return
        wanted = self.recorded.wanted
        with self.aside():
            try:
                check_outputs(source, forward_pass, forward_pass.outputs, wanted, self.method)
            except UnsupportedModelError:
                if not reached or reached == forward_pass.outputs:
                    raise
                check_outputs(source, forward_pass, reached, wanted, of_these)


def _is_of_samples(tensor: Tensor, size: int) -> bool:
    return tensor.requires_grad and tensor.dim() > 0 and len(tensor) == size
