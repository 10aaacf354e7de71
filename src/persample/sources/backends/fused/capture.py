"""Seeing every use of a parameter: a `TorchFunctionMode` that sends each operation on one to a rule.

The mode is active during the forward pass of one call and sees the functions of `torch` by name, so modules need not be
touched: tied weights, functional calls and modules called twice are simply further uses. An operation on a parameter
is run with its detached value, so autograd computes the gradient of its other operands as usual, but never that of the
parameter; a tap at its result delivers δ to the contributions of the parameter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from persample.errors import PersampleError, UnsupportedModelError
from persample.sources.backends.contributions import Contribution
from persample.sources.backends.fused import op_table, parts, rule_table
from persample.sources.backends.fused.arguments import memory_of, substitute, tensors_in
from persample.sources.backends.fused.autograd_functions import Kernel, Results, is_kernel
from persample.sources.backends.fused.axis import Place
from persample.sources.backends.fused.expressions import Expression, express
from persample.sources.backends.fused.layout import Layout, batch_first, layout_of
from persample.sources.backends.fused.owners import Owners
from persample.sources.backends.fused.propagation import (
    Call,
    Lost,
    Unknown,
    Where,
    after,
    bound,
    outputs_of,
    without_owner,
)
from persample.sources.backends.fused.rules import in_place
from persample.sources.backends.fused.rules.expanded import copied, own_of_one_sample
from persample.sources.backends.fused.taps import Copies, Mixed, Operation, Tap, second_derivatives
from persample.sources.backends.fused.torch_function_bypass import opened
from persample.sources.backends.fused.tracked import Layouts, Seen, saved_tensors_are_intercepted
from persample.sources.batch import Batch
from persample.sources.model.autograd_graph import nodes_behind, outer_backward, variables_of
from persample.sources.model.refusals import VMAP_OR_VJP, hooked_parameter
from persample.sources.selfcheck.oracle import inner_backward_pass
from persample.sources.selfcheck.raw_errors import is_raw
from persample.sources.splits.tree import SHARED

Build = Callable[..., Contribution]


class Capture(TorchFunctionMode):
    """Records the uses of parameters during one forward pass.

    Args:
        parameters: the parameters to follow, by name.
        batch_size: B.
        sink: is told of every use (`expect`), and given its contribution (`receive`) in the backward pass.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], batch_size: int, sink: Any) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.sink = sink
        self.forward_pass = True
        self.passed_by = ""  # a parameter of which a backward pass inside of the backward pass went by
        self.in_outer_backward: Callable[[], bool] = lambda: True
        self.without_gradient = False  # whether a parameter was used where autograd does not look
        self.rounds_otherwise = False  # whether the results of an operation may differ in their last bits
        self.intercepted = False  # whether something intercepts what autograd saves, as activation checkpointing does
        self.parameters_repeated = False  # whether parameters stand beside samples, an entry for each
        self.beside_samples = False  # whether rows of nobody may be made of parameters
        self.layouts = Layouts()
        self.parts = parts.Seen()
        self.constants = Seen()  # in what activation checkpointing repeats
        # Expressions are few and must outlive their last use, so they are held; parameters are expressions, too.
        self.expressions: dict[int, tuple[Tensor, Expression]] = {}
        self.bypassed: set[Expression] = set()  # whose graphs do not see the gradients of all of their uses
        self.remade: dict[Hashable, tuple[Tensor, int] | None] = {}  # expressions as samples, by id and layout
        self.kernels: dict[Any, Results] = {}  # results of custom functions that took a parameter, by their nodes
        self.aliases: list[Tensor] = []  # tensors that share memory with expressions, without being seen as ones
        device = next((p.device for p in parameters.values()), torch.device("cpu"))
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        for name, p in parameters.items():
            self.expressions[id(p)] = (p, Expression(p.detach(), p, {name: p}, moves=True, is_parameter=True))

    def follow(self, batch: Batch) -> None:
        """Follow the tensors of the batch.

        Raises:
            UnsupportedModelError: one tensor stands for several samples, or for one and for what all share.
        """
        places: dict[int, object] = {}
        for tensor, dim, owners in batch.followed():
            place = dim, None if owners is None else owners.tolist()
            if places.setdefault(id(tensor), place) != place:
                raise UnsupportedModelError(
                    f"The same tensor, of shape {tuple(tensor.shape)}, stands for several samples, or for samples and "
                    "for what all of them share, which backend 'fused' cannot tell apart: pass a .clone() for each."
                )
            if place != SHARED:
                self.layouts[tensor] = layout_of(tensor, dim, owners, self.batch_size)

    def finish(self, losses: Tensor) -> Tensor:
        """Return the losses, of which those of a sample depend on this sample alone.

        Raises:
            UnsupportedModelError: they do not.
        """
        due = Layout(1, self.batch_size, 1)
        if self.expression(losses) is not None:
            return copied(self, losses, 1, due, Place(0))
        where = self.layouts.get(losses)
        mixed = where.mixed if isinstance(where, Lost) else where not in (None, due)
        if isinstance(where, Lost) and where.picked and self.parameters_repeated:
            raise UnsupportedModelError(
                f"The losses of a sample depend on rows of other samples ({where.reason}). If what is read there is "
                "the same for all of them, as a class token is, backend 'fused' cannot see it: use backend 'vmap', "
                "'vjp' or 'loop', or read it from the sample's own rows. Else the gradient of a single sample does not "
                "exist."
            )
        if mixed:
            reason = where.reason if isinstance(where, Lost) else "its losses are not in the order of the samples"
            raise UnsupportedModelError(
                f"The model or the loss mixes the samples ({reason}), so the gradient of a single sample does not "
                "exist. Make every sample's loss depend on that sample alone."
            )
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
                f"{_name(func)} was called with a parameter inside of a transform of torch.func (vmap, grad), which "
                f"backend 'fused' cannot look into: {VMAP_OR_VJP}."
            )
        if self.without_gradient and self.forward_pass:
            self._note_kernels(followed)
        if len(used) + len(followed) < len(tensors):
            used += self._adopted(tensors)
        if not used:
            if followed:
                return self._carry(func, args, kwargs, followed)
            result = func(*args, **kwargs)
            if not self.forward_pass:
                self.constants.add(tensors_in(result))
            return result
        if func is torch.autograd.grad and any(self.expression(t) is None for t in tensors_in(args[0])):
            raise second_derivatives()
        if func is Tensor.detach and not self.forward_pass and _asked_by_checkpoint():
            return args[0]
        if not torch.is_grad_enabled():
            self.without_gradient = True
            return self._aliased(used, self.plain(func, *self.values((args, dict(kwargs)))))
        if followed:
            where = self._mixture(followed)
            return self._use(func, args, kwargs) if where is None else self._use_mixed(func, args, kwargs, where)
        self._require_constants(func, [t for t in tensors if id(t) not in self.expressions])
        if in_place.writes(func, args):
            return in_place.write_parameters(self, func, args, kwargs)
        if op_table.asked_in_place(func, args, kwargs):
            return self.again(opened(func), args, kwargs, {})
        return self.express(func, args, kwargs)

    def _note_kernels(self, followed: list[Tensor]) -> None:
        """Remember those of `followed` that custom functions returned."""
        for t in followed:
            where = self.layouts.get(t)
            if not isinstance(where, Layout) or self.intercepted or not is_kernel(t.grad_fn):
                continue
            if where.owners is None or where.owners.complete:
                self.kernels.setdefault(t.grad_fn, {})[t.output_nr] = where

    def taken(self, node: Any) -> dict[int, Expression]:
        """Return the expressions that the custom function of `node` took, by the number of the edge to them."""
        variables = [getattr(following, "variable", None) for following, _ in node.next_functions]
        return {place: e for place, v in enumerate(variables) if (e := self.expression(v)) is not None}

    @contextmanager
    def _kernels_served(self) -> Iterator[None]:
        """Let custom functions that took parameters give their contributions in the backward pass inside."""
        served = []
        try:
            for node, results in self.kernels.items():
                taken = self.taken(node)
                if taken:
                    self._expect(taken.values())
                    served.append(Kernel(self, node, results, taken))
            self.kernels.clear()
            yield
        finally:
            for kernel in served:
                for handle in kernel.handles:
                    handle.remove()

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

    def inner_gradient(self) -> Tensor:
        """Return the anchor's gradient in a backward pass inside of the backward pass.

        It goes nowhere where that is `torch.autograd.grad` by something between. It stays in the anchor where that is
        `.backward()`, which would give the parameters their gradients beside those of the losses.
        """
        return self.anchor.detach()

    # What rules use: operands.

    def expression(self, tensor: Any) -> Expression | None:
        """Return the expression that `tensor` is, or None if it is not made of parameters."""
        entry = self.expressions.get(id(tensor))
        return entry[1] if entry is not None else None

    def leaves(self) -> dict[Tensor, Expression]:
        """Return what the model sees of the expressions, and has no history there; parameters are left out."""
        seen = self.expressions.values()
        return {t: e for t, e in seen if t.requires_grad and t.is_leaf and not e.is_parameter}

    def value(self, tensor: Any) -> Any:
        """Return `tensor` without its way back to the parameters."""
        expression = self.expression(tensor)
        return tensor if expression is None else expression.value

    def values(self, tree: Any) -> Any:
        """Return nested arguments without their ways back to the parameters."""
        return substitute(tree, {id(t): self.value(t) for t in tensors_in(tree)})

    # What rules use: samples.

    def layout(self, tensor: Tensor, operation: str) -> Layout:
        """Return where the samples are in `tensor`.

        Raises:
            UnsupportedModelError: nobody can tell.
        """
        return self.known(self.layouts.get(tensor), operation, tensor.shape)

    def layout_of_rows(self, tensor: Tensor, operation: str) -> Layout:
        """Return the same for operations on single rows; some may have no owner until the result meets samples.

        States that a step begins with are zeros of nobody beside those of sequences that began before.
        """
        where = self.layouts.get(tensor)
        if isinstance(where, Layout) and where.owners is not None and not where.complete:
            return where._replace(owners=Owners(where.owners.labels, where.batch))
        return self.layout(tensor, operation)

    def known(self, where: Where, operation: str, shape: torch.Size) -> Layout:
        """Return `where` if it is a layout.

        Raises:
            UnsupportedModelError: it is none, or some entries belong to no sample.
        """
        reason = "which backend 'fused' did not see come into being"
        if isinstance(where, Layout):
            if where.complete:
                return where
            reason = "some entries of which belong to no sample"
        elif where is not None:
            reason = _lost_track(where)
        raise _not_known(operation, shape, reason)

    def samples_in(self, args: Any, kwargs: Mapping[str, Any]) -> dict[int, Layout]:
        """Return where the samples are in those operands that hold any, by the operand's id.

        Raises:
            UnsupportedModelError: nobody can tell for any of them, or samples were mixed in one.
        """
        found = {}
        operands = [t for t in tensors_in((args, dict(kwargs))) if t in self.layouts]
        for operand in operands:
            where = self.layouts.get(operand)
            if isinstance(where, Layout):
                found[id(operand)] = where
            elif where is not None and where.mixed:
                self.known(where, "An operation with parameters", operand.shape)
        if operands and not found:
            self.layout(operands[0], "An operation with parameters")
        return found

    def rows_of_sample(self, tensor: Tensor, operation: str) -> int:
        """Return R, where dim 0 of `tensor` has B·R entries, those of a sample side by side.

        Raises:
            UnsupportedModelError: the samples are elsewhere.
        """
        layout = self.layout(tensor, operation)
        place = layout.place(tensor.shape)
        if place is None or place[:2] != (0, 1) or layout.owners is not None:
            raise UnsupportedModelError(
                f"{operation} was called with a tensor of shape {tuple(tensor.shape)} whose dim 0 is not the sample: "
                f"backend 'fused' needs the samples there for this operation: {VMAP_OR_VJP}."
            )
        return place.after

    def batch_first(self, tensor: Tensor) -> Layout:
        """Return the layout of a tensor whose dim 0 is the sample."""
        return batch_first(tensor, self.batch_size)

    def follow_as(self, tensor: Tensor, layout: Layout) -> Tensor:
        """Follow `tensor`, which may be made of parameters, with the given layout, and return it."""
        self.layouts[tensor] = layout if layout.complete else without_owner(layout)
        return tensor

    # What rules use: running operations.

    def plain(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation that uses no parameter, and follow the samples in it."""
        followed = [t for t in tensors_in((args, dict(kwargs))) if t in self.layouts]
        return self._carry(func, args, kwargs, followed) if followed else func(*args, **kwargs)

    def again(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], others: Mapping[int, Tensor]) -> Any:
        """Run an operation from the beginning, with `others` in place of the operands that have these ids."""
        new_args, new_kwargs = substitute((args, dict(kwargs)), others)
        with self:
            return func(*new_args, **new_kwargs)

    def express(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation on parameters and what else is constant, and remember what its result is made of."""

        def remember(expression: Expression) -> Tensor:
            # What the model sees is a leaf of its own, so that autograd tells of a use that is not seen here.
            seen = expression.value.detach().requires_grad_()
            self.expressions[id(seen)] = (seen, expression)
            return seen

        used = [t for t in tensors_in((args, dict(kwargs))) if id(t) in self.expressions]
        sources = {id(t): self.expressions[id(t)][1] for t in used}
        if func is Tensor.register_hook:
            self._expect_hook(sources[id(args[0])])
        return self._aliased(used, express(func, args, kwargs, sources, remember))

    def fall_back(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run `func` as if it had no rule."""
        return rule_table.fallback(self, func, args, kwargs)

    def tap(
        self,
        result: Tensor,
        layout: Layout,
        operands: Iterable[tuple[Any, Build]],
        saved: tuple[Tensor, ...] = (),
    ) -> Tensor:
        """Return `result` so that its gradient δ reaches the contributions of `operands` in the backward pass.

        Args:
            result: what the operation returned; it depends on no parameter as far as autograd knows.
            layout: where the samples are in it.
            operands: pairs of an operand and of a function that makes its contribution from δ and `saved`. Operands
                that are not expressions of parameters are passed over.
            saved: what the contributions need of the forward pass.
        """
        uses = []
        for operand, build in operands:
            expression = operand if isinstance(operand, Expression) else self.expression(operand)
            if expression is not None:
                uses.append((expression, build))
        if uses:
            self._expect(expression for expression, _ in uses)
            result = Tap.apply(  # type: ignore[no-untyped-call]
                result, self.anchor, self, uses, *saved
            )
        return self.follow_as(result, layout)

    def run(
        self,
        forward: Callable[[Tensor], tuple[Tensor, tuple[Tensor, ...]]],
        backward: Callable[..., tuple[Tensor | None, Sequence[Contribution]]],
        x: Tensor,
        layout: Layout,
        operands: Sequence[Tensor | None],
    ) -> Tensor:
        """Return the result of an operation whose own backward pass is the cheapest way to the contributions.

        Args:
            forward: returns the result and what is to be saved, from `x`.
            backward: returns the gradient of `x` (or None, if its last argument says that nobody needs it) and a
                contribution for each operand, from δ, what was saved, and that last argument.
            x: the samples.
            layout: where the samples are in the result.
            operands: the expressions of parameters that take part; None and other tensors are passed over.
        """
        uses = [self.expression(operand) for operand in operands]
        self._expect(expression for expression in uses if expression is not None)
        result: Tensor = Operation.apply(  # type: ignore[no-untyped-call]
            x, self.anchor, self, uses, forward, backward
        )
        return self.follow_as(result, layout)

    def mixed(self, result: Tensor, where: Lost, expressions: Sequence[Expression], refusal: PersampleError) -> Tensor:
        """Return `result`, made of `expressions` and of mixed samples, so that `refusal` is raised if δ reaches it."""
        mixed: Tensor = Mixed.apply(result, self.anchor, refusal)  # type: ignore[no-untyped-call]
        self.layouts[mixed] = where
        return mixed

    def of_nobody(self, operand: Tensor, func: Any) -> Tensor:
        """Return `operand`, which is made of parameters, for a place beside whole samples, where nobody's rows are.

        It may be read from there, by itself. A gradient that comes back in another way is refused.
        """
        refusal = rule_table.no_rule(_name(func), "it puts a parameter beside whole samples")
        self.beside_samples = True
        beside: Tensor = Mixed.apply(self.value(operand), self.anchor, refusal)  # type: ignore[no-untyped-call]
        return beside

    def copies(self, values: Tensor, layout: Layout, expression: Expression, build: Build) -> Tensor:
        """Return `values` of an expression, an entry for each sample, so that δ reaches its contribution.

        Args:
            values: the values; they depend on no parameter as far as autograd knows.
            layout: where the samples are in them.
            expression: what they are copies of.
            build: makes the contribution from δ.
        """
        self._expect([expression])
        self.parameters_repeated = True
        copies: Tensor = Copies.apply(values, self.anchor, self, expression, build)  # type: ignore[no-untyped-call]
        return self.follow_as(copies, layout)

    def receive(self, expression: Expression, contribution: Contribution) -> None:
        """Give a contribution to the sink; taps call it in the backward pass."""
        self.sink.receive(expression, contribution)

    # Inner workings.

    def _aliased(self, used: list[Tensor], result: Any) -> Any:
        """Return `result`, and remember what in it shares memory with expressions but is none: what `detach` gives."""
        memories = {memory_of(self.value(t)) for t in used}
        for tensor in tensors_in((result,)):
            if id(tensor) not in self.expressions and tensor.layout is torch.strided and memory_of(tensor) in memories:
                self.aliases.append(tensor)
        return result

    def _expect(self, expressions: Iterable[Expression]) -> None:
        if self.forward_pass:
            for expression in expressions:
                self.sink.expect(expression)

    def _expect_hook(self, hooked: Expression) -> None:
        """Pull gradients back one by one from now on, as a hook may change each of them."""
        if hooked.is_parameter:
            raise hooked_parameter(hooked.names[0])
        if hooked in self.bypassed:
            raise UnsupportedModelError(
                f"A hook was put on a tensor made of {', '.join(map(repr, hooked.names))} after samples had met it, "
                "which backend 'fused' cannot follow: put the hook on it before, or use backend 'loop'."
            )
        for _, expression in self.expressions.values():
            if expression.parameters.keys() & hooked.parameters.keys():
                expression.moves, expression.made = False, None

    def _adopted(self, tensors: list[Tensor]) -> list[Tensor]:
        """Make expressions of those tensors that came into being unseen, if autograd knows how from parameters alone.

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
        """Raise unless `tensors`, which are not followed, depend on no sample and no parameter."""
        if self.forward_pass and self.intercepted:
            self.constants.add(tensors)
        if any(t.grad_fn is not None or not (self.forward_pass or t in self.constants) for t in tensors):
            raise UnsupportedModelError(
                f"{_name(func)} was called with a parameter and with a tensor that backend 'fused' did not see come "
                "into being (the result of a custom torch.autograd.Function, of torch.vmap or compiled code, or what "
                f"hooks on autograd's saved tensors made of the input of an activation checkpoint): {VMAP_OR_VJP}."
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
                parts.follow(self, func, args, kwargs, result)
                return result
            if rule is not None:
                return rule(self, *args, **kwargs)
            return rule_table.fallback(self, func, args, kwargs)
        except (PersampleError, torch.OutOfMemoryError):
            raise
        except (TypeError, ValueError, IndexError, ZeroDivisionError, RuntimeError) as error:
            result = func(*args, **kwargs)  # if the call itself is wrong, this raises what PyTorch says of it
            if {output.numel() for output in outputs_of(func, args, result)} == {0}:
                return self.plain(func, *self.values((args, dict(kwargs))))  # no entry, no gradient
            raise rule_table.no_rule(_name(func), str(error)) from error

    def _mixture(self, followed: list[Tensor]) -> Lost | None:
        """Return the reason if samples are mixed in one of the operands, or cannot be told apart in any; else None."""
        places = [self.layouts.get(t) for t in followed]
        lost = [where for where in places if isinstance(where, Lost)]
        mixed = next((where for where in lost if where.mixed), None)
        return lost[0] if mixed is None and len(lost) == len(places) else mixed

    def _use_mixed(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], where: Lost) -> Any:
        """Run an operation on parameters and mixed samples, which is right as long as no gradient comes back."""
        arguments = (args, dict(kwargs))
        operand = next(t for t in tensors_in(arguments) if self.layouts.get(t) == where)
        where = where._replace(pending=None)
        refusal = _not_known(_name(func), operand.shape, _lost_track(where))
        if op_table.is_in_place(func) or op_table.asked_in_place(func, args, kwargs):
            raise refusal
        expressions = [e for t in tensors_in(arguments) if (e := self.expression(t)) is not None]
        result = self.plain(func, *self.values(arguments))
        if isinstance(result, tuple | list) and type(result) not in (tuple, list):
            raise refusal
        outputs = [t for t in tensors_in((result,)) if t.is_floating_point() or t.is_complex()]
        return substitute(result, {id(t): self.mixed(t, where, expressions, refusal) for t in outputs})

    def _carry(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], followed: list[Tensor]) -> Any:
        """Run an operation that uses no parameter, and follow the samples from its operands into its results."""
        result = rule_table.FASTER.get(func, func)(*args, **kwargs)
        if self.parts:
            parts.follow(self, func, args, kwargs, result)
        if op_table.gives_nothing_of_samples(func, args, kwargs):
            return result
        if func in op_table.SAME or func in op_table.RESHAPES:
            where = self.layouts.get(args[0]) if args else None
            if where is None:
                return result
            if func in op_table.SAME or result.numel() == args[0].numel():
                self.layouts[result] = where
                return result
        if func in op_table.SHAPE_KEEPING and len(followed) == 1 and "out" not in kwargs:
            (operand,) = followed
            if result is not operand and result.shape == operand.shape:
                self.layouts[result] = self.layouts.get(operand)
                return result
        outputs = outputs_of(func, args, result)
        if not outputs:
            return result
        places = self._after(func, args, kwargs, followed, outputs)
        read = self._parts_read(outputs, places) if self.parts else {}
        if read:
            result = substitute(result, read)
            kept = [(output, where) for output, where in zip(outputs, places, strict=True) if id(output) not in read]
            outputs, places = [output for output, _ in kept], [where for _, where in kept]
        for output, where in zip(outputs, places, strict=True):
            self._place(output, where, func)
        new = isinstance(result, Tensor) and not result._is_view() and all(result is not t for t in followed)
        if places == [None] and new and result.requires_grad and not self.beside_samples:
            # Nothing of the samples was moved into it, as if their mask were empty: it is a constant.
            return result.detach()
        return result

    def _parts_read(self, outputs: list[Tensor], places: Sequence[Where]) -> dict[int, Tensor]:
        """Return what stands for those of `outputs` that are a part made of parameters, by their id."""
        found = {}
        for output, where in zip(outputs, places, strict=True):
            if self.beside_samples or not isinstance(where, Layout) or where.owners is not None:
                part = parts.read(self, output)
                if part is not None:
                    found[id(output)] = part
        return found

    def _after(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], followed: list[Tensor], outputs: list[Tensor]
    ) -> Sequence[Where]:
        places = {id(t): self.layouts.get(t) for t in followed}
        samples = {key: where for key, where in places.items() if isinstance(where, Layout)}
        losses = [where for where in places.values() if isinstance(where, Lost)]
        lost = next((where for where in losses if where.mixed), losses[0] if losses else None)
        if func in op_table.RESHAPES_IN_PLACE:
            lost = Lost(f"{_name(func)} gives a tensor another shape in place")
        elif lost is not None and lost.pending is not None:
            pending = {key: where.pending for key, where in places.items() if isinstance(where, Lost)}
            try:
                return bound(Call(func, args, kwargs, samples, self.batch_size, outputs), pending)
            except Unknown:
                lost = lost._replace(pending=None)
        elif samples and (lost is None or not lost.mixed):
            try:
                return after(Call(func, args, kwargs, samples, self.batch_size, outputs))
            except (TypeError, ValueError, IndexError, RuntimeError) as error:  # but the operation itself ran
                if not is_raw(error):
                    raise
                lost = Lost(f"{_name(func)} was not understood: {error}")
        return [lost for _ in outputs]

    def _place(self, output: Tensor, where: Where, func: Any) -> None:
        """Note where the samples are in a result."""
        if where is None or (isinstance(where, Lost) and not output.is_floating_point()):
            return  # it holds no samples, or has no gradient, so that it may as well be a constant
        base = output._base
        if base is not None and op_table.is_in_place(func) and self.layouts.get(output) != where:
            self.layouts[base] = Lost(f"{_name(func)} writes samples into a part of a tensor")
        self.layouts[output] = where


def _not_known(operation: str, shape: torch.Size, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{operation} was called with a tensor of shape {tuple(shape)} {reason}: {VMAP_OR_VJP}."
    )


def _lost_track(where: Lost) -> str:
    return f"in which backend 'fused' lost track of the samples ({where.reason})"


def _asked_by_checkpoint() -> bool:
    """Whether activation checkpointing asked for the operation that the mode sees, for its own purposes."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals["__name__"].startswith("persample.sources.backends.fused."):
        frame = frame.f_back
    return frame is not None and frame.f_globals["__name__"] == "torch.utils.checkpoint"


def _name(func: Any) -> str:
    return getattr(func, "__name__", str(func))
