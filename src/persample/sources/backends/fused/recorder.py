"""Recording the user's own forward and backward passes, by the same capture of operations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from persample.dtypes import at_least_float32, without_autocast
from persample.errors import PersampleError, UnsupportedModelError
from persample.quantities.block import Formed
from persample.sources.backends.contributions import Contribution
from persample.sources.backends.fused.accumulators import Blocks, Moment
from persample.sources.backends.fused.arguments import tensors_in
from persample.sources.backends.fused.capture import Capture
from persample.sources.backends.fused.expressions import Expression, version_of
from persample.sources.backends.fused.layout import Layout
from persample.sources.backends.fused.propagation.lost import Lost
from persample.sources.backends.fused.torch_function_bypass import opened
from persample.sources.backends.fused.trace import mixing
from persample.sources.backends.fused.usage_recorder import unseen_use
from persample.sources.model.autograd_graph import nodes_behind
from persample.sources.model.refusals import VMAP_OR_VJP, refuse_impossible
from persample.sources.recording.forward_pass import ForwardPass
from persample.sources.recording.recorder import Recorder
from persample.sources.recording.reduction import refuse_uses_past_outputs, used_outside
from persample.sources.recording.results import LossReduction, Sums, Wanted
from persample.sources.selfcheck.oracle import inner_backward_pass
from persample.sources.selfcheck.rounds import Reading
from persample.sources.source import PerSampleGradSource

# The mode is active meanwhile, for activation checkpointing, but this call is not the model's.
_backward: Callable[..., None] = opened(torch.autograd.backward) or torch.autograd.backward


class FusedRecorder(Recorder):
    """Dispatches the operations of a user's forward pass to the rules, and leaves the gradient in `p.grad`.

    Autograd never computes the gradient of a parameter that is used in the forward pass. So if it accumulates one all
    the same, the parameter was used by something unseen.
    """

    def __init__(self, source: PerSampleGradSource, reduction: LossReduction, wanted: Wanted) -> None:
        parameters = source.parameters()
        super().__init__(source.model, parameters, reduction, wanted)
        self.source = source
        self.capture: Capture | None = None
        self._sums: Moment | Blocks = Moment(0)
        self._reading: Reading | None = None
        self._unseen_outputs = False  # whether an output with entries for the samples seems made of parameters alone
        self._finishing = False  # whether gradients are pulled back to the parameters, after the backward pass
        self._mixed: dict[Node, str] = {}
        self._before: dict[str, tuple[Tensor | None, int]] = {}  # gradients before the backward pass, and versions
        for name, p in parameters.items():
            self.hold(p.register_post_accumulate_grad_hook(self._unseen(name)))

    def begin(self, forward_pass: ForwardPass) -> None:
        refuse_impossible(self.model)
        self.source.refuse_hooks()
        self.remember_state(self.source, forward_pass)
        self.capture = None
        self._mixed.clear()
        self._reading = self.reading(forward_pass)
        if forward_pass.batch.size == 1:  # the gradient of a single sample is the ordinary one
            return
        recorder, size = self, forward_pass.batch.size
        self._sums = Moment(size) if self._reading is None else Blocks(size, self._reading.receive)

        class Watched:
            expect = self._sums.expect

            def receive(self, expression: Expression, contribution: Contribution) -> None:
                recorder.reach(forward_pass)
                recorder._sums.receive(expression, contribution)

        class OutsideToo(Capture):
            def mixed(
                self, result: Tensor, where: Lost, expressions: Sequence[Expression], refusal: PersampleError
            ) -> Tensor:
                if recorder.current is None:
                    refusal = UnsupportedModelError(used_outside(expressions[0].names[0]))
                return super().mixed(result, where, expressions, refusal)

        self.capture = OutsideToo(self.recorded.parameters, size, Watched())
        self.capture.follow(forward_pass.batch)

    def end(self, forward_pass: ForwardPass, outputs: list[Tensor]) -> None:
        if self.capture is not None:
            self._unseen_outputs = any(self.capture.expression(outputs[i]) is not None for i in forward_pass.outputs)
            forward_pass.outputs = [i for i in forward_pass.outputs if self._is_batch_first(outputs[i])]

    def operation(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self.capture is None:
            return func(*args, **kwargs)
        try:
            result = self.capture.__torch_function__(func, types, args, kwargs)
        except UnsupportedModelError as refusal:
            expressions = (self.capture.expression(t) for t in tensors_in((args, dict(kwargs))))
            names = [name for expression in expressions if expression is not None for name in expression.names]
            if names and self.current is None:
                raise UnsupportedModelError(used_outside(names[0])) from refusal
            raise
        for output in tensors_in((result,)):
            if output.grad_fn is not None and output.dim() > 0:
                where = self.capture.layouts.get(output)
                if isinstance(where, Lost) and where.mixed:
                    self._mixed[output.grad_fn] = where.reason
        return result

    def before_backward(self, losses: Sequence[Tensor]) -> AbstractContextManager[Any]:
        self._refuse_parameters_alone(losses)
        self._refuse_mixing(losses)
        self.refuse_unseparable(losses, self.source)
        with torch._C.DisableTorchFunction():
            edges = [edge for p in self.passes[-1:] for edge in p.edges.values()]
            for loss in losses:
                refuse_uses_past_outputs(loss, edges, self.recorded.parameters)
        return self._during_backward(losses)

    def run_backward(self, *args: Any, **kwargs: Any) -> None:
        _backward(*args, **kwargs)

    @contextmanager
    def _during_backward(self, losses: Sequence[Tensor]) -> Iterator[None]:
        if self.capture is not None:
            self._before = {name: _version(p.grad) for name, p in self.recorded.parameters.items()}
            with self.capture.during_backward(losses):
                yield
        else:
            with self.with_gradients():
                yield

    def after_backward(self, forward_pass: ForwardPass) -> Sums:
        if self.capture is None:
            self._check(forward_pass)
            if self._reading is not None:
                for name, g in self.gradients.items():
                    self._reading.receive(Formed(name, 0, 1, at_least_float32(g).unsqueeze(0)))
            return Sums(1, self.gradients, {name: g.square() for name, g in self.gradients.items()})
        for leaf, expression in self.capture.leaves().items():
            if leaf.grad is not None:
                raise UnsupportedModelError(unseen_use(expression.names[0]))
        sink = self._sums
        device = next((p.device for p in self.recorded.parameters.values()), torch.device("cpu"))
        self._finishing = True
        with torch.enable_grad(), without_autocast(device):
            sink.finish()
        self._finishing = False
        found = self._reading if isinstance(sink, Blocks) else sink
        assert found is not None  # what reads blocks is there where they are made
        for name, total in found.total.items():
            p = self.recorded.parameters[name]
            gradient = total.detach().to(p.dtype, copy=True)
            p.grad = gradient if p.grad is None else p.grad + gradient
        self.capture = None
        for name in found.total:  # as autograd does it, which has not accumulated these gradients
            p = self.recorded.parameters[name]
            for hook in list((p._post_accumulate_grad_hooks or {}).values()):
                hook(p)
        self._check(forward_pass)
        return Sums(forward_pass.batch.size, found.total, found.squares)

    def quantities(self, forward_pass: ForwardPass) -> Sequence[Any]:
        if self._reading is None:
            return ()
        self._finishing = True
        with torch.enable_grad():
            found = self._reading.results()
        self._finishing, self._reading = False, None
        return found

    def left_out(self) -> Iterable[str]:
        return self.gradients

    def _check(self, forward_pass: ForwardPass) -> None:
        if forward_pass.outputs:  # else the model computes its loss itself, in one number
            self.check(self.source, forward_pass)

    def _unseen(self, name: str) -> Callable[[Tensor], None]:
        def refuse(parameter: Tensor) -> None:
            if self._finishing:
                raise inner_backward_pass(name)
            # Autograd tells of a gradient that is not defined, too: that of a custom function of the parameter.
            before, version = self._before.get(name, (None, 0))
            with torch._C.DisableTorchFunction():
                unchanged = parameter.grad is before and _version(parameter.grad)[1] == version
            if self.in_backward and self.capture is not None and not unchanged:
                raise UnsupportedModelError(unseen_use(name))

        return refuse

    def _is_batch_first(self, output: Tensor) -> bool:
        where = self.capture.layouts.get(output) if self.capture is not None else None
        axis = where.axis(output.shape) if isinstance(where, Layout) else None
        return axis is None or axis.dim == 0

    def _refuse_parameters_alone(self, losses: Iterable[Tensor]) -> None:
        """Raise if a loss was computed from parameters alone, as far as the capture saw."""
        for loss in losses:
            expression = self.capture.expression(loss) if self.capture is not None else None
            if expression is not None and self._unseen_outputs:
                raise UnsupportedModelError(
                    "The model's outputs depend on the samples by an operation that backend 'fused' cannot see while "
                    f"recording (a transform of torch.func such as vmap, or compiled code): {VMAP_OR_VJP}; or call "
                    "moments() or observe(), where 'fused' may support it."
                )
            if expression is not None:
                raise UnsupportedModelError(used_outside(expression.names[0]))

    def _refuse_mixing(self, losses: Iterable[Tensor]) -> None:
        """Raise if samples were mixed in a tensor that the loss depends on, before the losses were summed."""
        for node in (node for loss in losses for node in nodes_behind(loss)) if self._mixed else ():
            if node in self._mixed:
                raise mixing(self._mixed[node])


def _version(gradient: Tensor | None) -> tuple[Tensor | None, int]:
    return gradient, 0 if gradient is None else version_of(gradient)
