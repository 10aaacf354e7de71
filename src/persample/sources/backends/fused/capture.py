"""Capturing every use of a parameter: a `TorchFunctionMode` that dispatches operations on parameters to rules.

The mode is active during the forward pass of one call and sees the functions of `torch` by name, so modules need not be
touched: tied weights, functional calls and modules called twice are simply further uses. An operation on a parameter
is run with its detached value, so autograd computes the gradient of its other operands as usual, but never that of the
parameter; a tap at its result delivers δ to the contributions of the parameter.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from persample.errors import PersampleError, UnsupportedModelError
from persample.sources.backends.fused import op_table, rule_table
from persample.sources.backends.fused.arguments import substitute, tensors_in
from persample.sources.backends.fused.autograd_functions import Kernel, Results, is_kernel
from persample.sources.backends.fused.axis import Axis
from persample.sources.backends.fused.carry import carry, plain
from persample.sources.backends.fused.expressions import Expression
from persample.sources.backends.fused.layout import Layout, layout_of
from persample.sources.backends.fused.op_table import name_of
from persample.sources.backends.fused.propagation.call import outputs_of
from persample.sources.backends.fused.propagation.lost import Lost
from persample.sources.backends.fused.rules import in_place
from persample.sources.backends.fused.rules.expanded import copied, own_of_one_sample
from persample.sources.backends.fused.rules.parts import follow
from persample.sources.backends.fused.taps import second_derivatives
from persample.sources.backends.fused.torch_function_bypass import opened
from persample.sources.backends.fused.trace import Sink, Trace, lost_track, mixing, not_known
from persample.sources.backends.fused.tracked import saved_tensors_are_intercepted
from persample.sources.backends.fused.vjp import no_rule
from persample.sources.batch import Batch
from persample.sources.model.autograd_graph import nodes_behind, outer_backward, variables_of
from persample.sources.model.refusals import VMAP_OR_VJP
from persample.sources.selfcheck.oracle import inner_backward_pass
from persample.sources.splits.tree import SHARED


class Capture(Trace):
    """Records the uses of parameters during one forward pass.

    Args:
        parameters: the parameters to follow, by name.
        batch_size: B.
        sink: is told of every use (`expect`), and given its contribution (`receive`) in the backward pass.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], batch_size: int, sink: Sink) -> None:
        super().__init__(parameters, batch_size, sink)
        self.kernels: dict[Any, Results] = {}  # results of custom functions that took a parameter, by their nodes

    def follow(self, batch: Batch) -> None:
        """Follow the tensors of the batch.

        Raises:
            UnsupportedModelError: one tensor stands for several samples, or for one and for what all share.
        """
        held: dict[int, object] = {}
        for tensor, dim, owners in batch.followed():
            along = dim, None if owners is None else owners.tolist()
            if held.setdefault(id(tensor), along) != along:
                raise UnsupportedModelError(
                    f"The same tensor, of shape {tuple(tensor.shape)}, is given for several samples, or both for "
                    "samples and as shared, which backend 'fused' cannot tell apart: pass a .clone() for each."
                )
            if along != SHARED:
                self.layouts[tensor] = layout_of(tensor, dim, owners, self.batch_size)

    def finish(self, losses: Tensor) -> Tensor:
        """Return the losses, checked that each depends on its own sample only.

        Raises:
            UnsupportedModelError: they do not.
        """
        due = Layout(1, self.batch_size, 1)
        if self.expression(losses) is not None:
            return copied(self, losses, 1, due, Axis(0))
        where = self.layouts.get(losses)
        mixed = where.mixed if isinstance(where, Lost) else where not in (None, due)
        if isinstance(where, Lost) and where.picked and self.parameters_repeated:
            raise UnsupportedModelError(
                f"The loss of a sample depends on rows of other samples ({where.reason}). If those rows are the same "
                "for all samples, as a class token is, backend 'fused' cannot see that: use backend 'vmap', 'vjp' or "
                "'loop', or read them from the sample's own rows. Otherwise the gradient of a single sample does not "
                "exist."
            )
        if mixed:
            reason = where.reason if isinstance(where, Lost) else "its losses are not in the order of the samples"
            raise mixing(reason)
        return losses

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in op_table.METADATA:
            return func(*args, **kwargs)
        self.intercepted = self.intercepted or saved_tensors_are_intercepted()
        tensors = tensors_in((*args, *kwargs.values()) if kwargs else args)
        used = [t for t in tensors if id(t) in self.expressions]
        followed = [t for t in tensors if t in self.layouts]
        if torch._C._functorch.peek_interpreter_stack() is not None:
            if not used:
                return func(*args, **kwargs)  # what leaves the transform is looked at then, see `_adopted`
            raise UnsupportedModelError(
                f"{name_of(func)} was called with a parameter inside a transform of torch.func (vmap, grad), which "
                f"backend 'fused' cannot see into: {VMAP_OR_VJP}."
            )
        if self.without_gradient and self.forward_pass:
            self._note_kernels(followed)
        if len(used) + len(followed) < len(tensors):
            used += self._adopted(tensors)
        if not used:
            if followed:
                return carry(self, func, args, kwargs, followed)
            result = func(*args, **kwargs)
            if not self.forward_pass:
                self.constants.add(tensors_in(result))
            return result
        return self._of_parameters(func, args, kwargs, tensors, followed)

    def _of_parameters(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: list[Tensor], followed: list[Tensor]
    ) -> Any:
        """Run an operation on `tensors`; some are computed from parameters, those in `followed` hold samples."""
        if func is torch.autograd.grad and any(self.expression(t) is None for t in tensors_in(args[0])):
            raise second_derivatives()
        if func is Tensor.detach and not self.forward_pass and _asked_by_checkpoint():
            return args[0]
        if not torch.is_grad_enabled():
            self.without_gradient = True
            used = [t for t in tensors if id(t) in self.expressions]
            return self.aliased(used, plain(self, func, *self.values((args, dict(kwargs)))))
        if followed:
            where = self._mixture(followed)
            waits = (
                where is not None and where.pending is not None and len(followed) == 1 and func in op_table.POINTWISE
            )
            return (
                self._use(func, args, kwargs) if where is None or waits else self._use_mixed(func, args, kwargs, where)
            )
        self._require_constants(func, [t for t in tensors if id(t) not in self.expressions])
        if in_place.writes(func, args):
            return in_place.write_parameters(self, func, args, kwargs)
        if op_table.asked_in_place(func, args, kwargs):
            return self.again(opened(func), args, kwargs, {})
        return self.express(func, args, kwargs)

    def _note_kernels(self, followed: list[Tensor]) -> None:
        """Remember which of `followed` were returned by custom functions."""
        for t in followed:
            where = self.layouts.get(t)
            if not isinstance(where, Layout) or self.intercepted or not is_kernel(t.grad_fn):
                continue
            if where.owners is None or where.owners.complete:
                self.kernels.setdefault(t.grad_fn, {})[t.output_nr] = where

    def taken(self, node: Any) -> dict[int, Expression]:
        """Return the expressions that the custom function of `node` took, by the number of the edge to them."""
        variables = [getattr(following, "variable", None) for following, _ in node.next_functions]
        return {number: e for number, v in enumerate(variables) if (e := self.expression(v)) is not None}

    @contextmanager
    def _kernels_served(self) -> Iterator[None]:
        """Collect contributions from custom functions that took parameters, in the backward pass inside the context."""
        served = []
        try:
            for node, results in self.kernels.items():
                taken = self.taken(node)
                if taken:
                    self.expect(taken.values())
                    served.append(Kernel(self, node, results, taken))
            self.kernels.clear()
            yield
        finally:
            for kernel in served:
                kernel.remove()

    @contextmanager
    def during_backward(self, roots: Iterable[Tensor] = ()) -> Iterator[None]:
        """Stay active in the backward pass from `roots` where it may repeat parts of the forward pass.

        Activation checkpointing does; so may a custom `torch.autograd.Function`, in which autograd does not look.
        """
        self.parts.refuse_written()
        with self._kernels_served(), outer_backward(roots) as self.in_outer_backward:
            self.forward_pass = self.layouts.forward_pass = False
            if self.intercepted or self.without_gradient:
                with self:
                    yield
            else:
                yield
        if self.anchor.grad is not None:
            raise inner_backward_pass(self.passed_by)

    def fall_back(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return rule_table.fallback(self, func, args, kwargs)

    # Inner workings.

    def _adopted(self, tensors: list[Tensor]) -> list[Tensor]:
        """Turn tensors of unseen origin into expressions, if autograd's graph shows that only parameters made them.

        A custom `torch.autograd.Function` gives such ones. Its backward pass then runs for each sample.
        """
        if self.intercepted or not self.forward_pass or not torch.is_grad_enabled():
            return []
        found = []
        for tensor in tensors:
            if tensor.grad_fn is None or tensor._is_view() or id(tensor) in self.expressions or tensor in self.layouts:
                continue
            leaves = variables_of(nodes_behind(tensor))
            sources = [(leaf, e) for leaf in leaves if (e := self.expression(leaf)) is not None]
            if sources and len(sources) == len(leaves):
                parameters = {name: p for _, source in sources for name, p in source.parameters.items()}
                through = {leaf: source for leaf, source in sources if not source.is_parameter}
                graph = tensor.clone()  # memory and history of its own, whatever is written into the tensor later on
                expression = Expression(graph.detach(), graph, parameters, moves=False, through=through)
                self.expressions[id(tensor)] = (tensor, expression)
                self.without_gradient = True  # its backward pass may give gradients to parameters by itself
                found.append(tensor)
        return found

    def _require_constants(self, func: Any, tensors: list[Tensor]) -> None:
        """Raise if one of `tensors`, which are not followed, depends on a sample or a parameter."""
        if self.forward_pass and self.intercepted:
            self.constants.add(tensors)
        if any(t.grad_fn is not None or not (self.forward_pass or t in self.constants) for t in tensors):
            raise UnsupportedModelError(
                f"{name_of(func)} was called with a parameter and a tensor of unseen origin (the result of a custom "
                "torch.autograd.Function, of torch.vmap or of compiled code, or the input of an activation "
                f"checkpoint changed by saved-tensor hooks), which backend 'fused' cannot follow: {VMAP_OR_VJP}."
            )

    def _use(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation on samples and expressions of parameters."""
        rule = rule_table.RULES.get(func)
        try:
            if args and self.expression(args[0]) is not None and in_place.writes(func, args):
                return in_place.write_samples(self, func, args, kwargs)
            own = own_of_one_sample(self, args, kwargs)
            if own:
                result = self.again(func, args, kwargs, own)
                follow(self, func, args, kwargs, result)
                return result
            if rule is not None:
                return rule(self, *args, **kwargs)
            return self.fall_back(func, args, kwargs)
        except (PersampleError, torch.OutOfMemoryError):
            raise
        except (TypeError, ValueError, IndexError, ZeroDivisionError, RuntimeError) as error:
            result = func(*args, **kwargs)  # if the call itself is wrong, this raises what PyTorch says of it
            if {output.numel() for output in outputs_of(func, args, result)} == {0}:
                return plain(self, func, *self.values((args, dict(kwargs))))  # no entry, no gradient
            raise no_rule(name_of(func), str(error)) from error

    def _mixture(self, followed: list[Tensor]) -> Lost | None:
        """Return the reason why the samples in an operand are mixed or cannot be told apart; None if they are not."""
        layouts = [self.layouts.get(t) for t in followed]
        lost = [where for where in layouts if isinstance(where, Lost)]
        mixed = next((where for where in lost if where.mixed), None)
        return lost[0] if mixed is None and len(lost) == len(layouts) else mixed

    def _use_mixed(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], where: Lost) -> Any:
        """Run an operation on parameters and mixed samples, which is exact as long as no gradient returns."""
        arguments = (args, dict(kwargs))
        operand = next(t for t in tensors_in(arguments) if self.layouts.get(t) == where)
        where = where._replace(pending=None)
        refusal = not_known(name_of(func), operand.shape, lost_track(where))
        if op_table.is_in_place(func) or op_table.asked_in_place(func, args, kwargs):
            raise refusal
        expressions = [e for t in tensors_in(arguments) if (e := self.expression(t)) is not None]
        result = plain(self, func, *self.values(arguments))
        if isinstance(result, tuple | list) and type(result) not in (tuple, list):
            raise refusal
        outputs = [t for t in tensors_in((result,)) if t.is_floating_point() or t.is_complex()]
        return substitute(result, {id(t): self.mixed(t, where, expressions, refusal) for t in outputs})


def _asked_by_checkpoint() -> bool:
    """Whether activation checkpointing itself called the operation."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals["__name__"].startswith("persample.sources.backends.fused."):
        frame = frame.f_back
    return frame is not None and frame.f_globals["__name__"] == "torch.utils.checkpoint"
