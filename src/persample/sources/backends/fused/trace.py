"""`Trace`: the state of a captured forward pass, and the interface that rules use.

Expressions of parameters, and where the samples are in tensors, are found by the tensors' identity. The mode that sends
operations to rules is built on top, in `capture`; rules, and what follows samples, need this much only.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from persample.errors import PersampleError, UnsupportedModelError
from persample.sources.backends.contributions import Contribution
from persample.sources.backends.fused.arguments import memory_of, substitute, tensors_in
from persample.sources.backends.fused.expressions import Expression, express
from persample.sources.backends.fused.layout import Layout
from persample.sources.backends.fused.op_table import name_of
from persample.sources.backends.fused.owners import Owners
from persample.sources.backends.fused.parts import PartTable
from persample.sources.backends.fused.propagation.lost import Lost, Where, without_owner
from persample.sources.backends.fused.taps import Build, Copies, Mixed, Operation, Tap
from persample.sources.backends.fused.tracked import Layouts, Seen
from persample.sources.backends.fused.vjp import no_rule
from persample.sources.model.refusals import VMAP_OR_VJP, hooked_parameter


class Sink(Protocol):
    """Receives the uses of parameters."""

    def expect(self, expression: Expression) -> None:
        """An operation of the forward pass uses `expression`."""

    def receive(self, expression: Expression, contribution: Contribution) -> None:
        """Receive the contribution of one use."""


class Trace(TorchFunctionMode):
    """The uses of parameters during one forward pass.

    Args:
        parameters: the parameters to follow, by name.
        batch_size: B.
        sink: is told of every use (`expect`), and given its contribution (`receive`) in the backward pass.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], batch_size: int, sink: Sink) -> None:
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
        self.parts = PartTable()
        self.constants = Seen()  # in what activation checkpointing repeats
        # Expressions are few and must outlive their last use, so they are held; parameters are expressions, too.
        self.expressions: dict[int, tuple[Tensor, Expression]] = {}
        self.bypassed: set[Expression] = set()  # whose graphs do not see the gradients of all of their uses
        # Expressions as samples, by id and layout.
        self.remade: dict[tuple[int, Layout], tuple[Tensor, int] | None] = {}
        self.aliases: list[Tensor] = []  # tensors that share memory with expressions, without being seen as ones
        device = next((p.device for p in parameters.values()), torch.device("cpu"))
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        for name, p in parameters.items():
            self.expressions[id(p)] = (p, Expression(p.detach(), p, {name: p}, moves=True, is_parameter=True))

    def inner_gradient(self) -> Tensor:
        """Return the anchor's gradient in a backward pass inside the backward pass.

        It goes nowhere where that is `torch.autograd.grad` by something between. It stays in the anchor where that is
        `.backward()`, which would give the parameters their gradients beside those of the losses.
        """
        return self.anchor.detach()

    # What rules use: operands.

    def expression(self, tensor: Any) -> Expression | None:
        """Return the expression of `tensor`; None if it was not computed from parameters."""
        entry = self.expressions.get(id(tensor))
        return entry[1] if entry is not None else None

    def put(self, tensor: Tensor, expression: Expression) -> None:
        """Note that `tensor` has another expression from now on."""
        self.expressions[id(tensor)] = (tensor, expression)
        for key in [key for key in self.remade if key[0] == id(tensor)]:
            del self.remade[key]

    def leaves(self) -> dict[Tensor, Expression]:
        """Return the detached tensors that the model sees in place of the expressions, without parameters."""
        seen = self.expressions.values()
        return {t: e for t, e in seen if t.requires_grad and t.is_leaf and not e.is_parameter}

    def value(self, tensor: Any) -> Any:
        """Return `tensor` detached from the parameters."""
        expression = self.expression(tensor)
        return tensor if expression is None else expression.value

    def values(self, tree: Any) -> Any:
        """Return nested arguments detached from the parameters."""
        return substitute(tree, {id(t): self.value(t) for t in tensors_in(tree)})

    # What rules use: samples.

    def layout(self, tensor: Tensor, operation: str) -> Layout:
        """Return where the samples are in `tensor`.

        Raises:
            UnsupportedModelError: it is unknown.
        """
        return self.known(self.layouts.get(tensor), operation, tensor.shape)

    def layout_of_rows(self, tensor: Tensor, operation: str) -> Layout:
        """Return the same for operations on single rows; some rows may have no owner yet.

        States that a step begins with are zeros of nobody beside those of sequences that began before.
        """
        where = self.layouts.get(tensor)
        if isinstance(where, Layout) and where.owners is not None and not where.complete:
            return where._replace(owners=Owners(where.owners.labels, where.batch))
        return self.layout(tensor, operation)

    def rows_in(self, args: Any, kwargs: Mapping[str, Any]) -> dict[int, Layout]:
        """As `samples_in`, for operations entry by entry; rows may have no owner, as with `layout_of_rows`.

        Raises:
            UnsupportedModelError: it is unknown.
        """
        followed = [t for t in tensors_in((args, dict(kwargs))) if t in self.layouts]
        if len(followed) == 1:
            (operand,) = followed
            where = self.layouts.get(operand)
            if isinstance(where, Lost) and where.pending is not None:
                return {id(operand): where.pending}
            if isinstance(where, Layout):
                return {id(operand): self.layout_of_rows(operand, "An operation with parameters")}
        return self.samples_in(args, kwargs)

    def known(self, where: Where, operation: str, shape: torch.Size) -> Layout:
        """Return `where` if it is a layout.

        Raises:
            UnsupportedModelError: it is none, or some entries belong to no sample.
        """
        reason = "whose origin backend 'fused' did not see"
        if isinstance(where, Layout):
            if where.complete:
                return where
            reason = "some entries of which belong to no sample"
        elif where is not None:
            reason = lost_track(where)
        raise not_known(operation, shape, reason)

    def samples_in(self, args: Any, kwargs: Mapping[str, Any]) -> dict[int, Layout]:
        """Return where the samples are in those operands that hold any, by the operand's id.

        Raises:
            UnsupportedModelError: it is unknown for one of them, or samples were mixed in one.
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
        axis = layout.axis(tensor.shape)
        if axis is None or axis[:2] != (0, 1) or layout.owners is not None:
            raise UnsupportedModelError(
                f"{operation} was called with a tensor of shape {tuple(tensor.shape)} whose dim 0 is not the sample, "
                f"but backend 'fused' needs it to be for this operation: {VMAP_OR_VJP}."
            )
        return axis.after

    def follow_as(self, tensor: Tensor, layout: Layout) -> Tensor:
        """Follow `tensor`, which may come from parameters, with the given layout, and return it."""
        self.layouts[tensor] = layout if layout.complete else without_owner(layout)
        return tensor

    # What rules use: running operations.

    def again(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], others: Mapping[int, Tensor]) -> Any:
        """Run an operation again, with the operands of these ids replaced by `others`."""
        new_args, new_kwargs = substitute((args, dict(kwargs)), others)
        with self:
            return func(*new_args, **new_kwargs)

    def express(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation on parameters and constants, and record its result as an expression."""

        def remember(expression: Expression) -> Tensor:
            # What the model sees is a leaf of its own, so that autograd tells of a use that is not seen here.
            seen = expression.value.detach().requires_grad_()
            self.expressions[id(seen)] = (seen, expression)
            return seen

        used = [t for t in tensors_in((args, dict(kwargs))) if id(t) in self.expressions]
        sources = {id(t): self.expressions[id(t)][1] for t in used}
        if func is Tensor.register_hook:
            self._expect_hook(sources[id(args[0])])
        return self.aliased(used, express(func, args, kwargs, sources, remember))

    @abstractmethod
    def fall_back(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run `func` by the fallback, without a rule."""

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
            self.expect(expression for expression, _ in uses)
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
        """Return the result of an operation whose own backward pass computes the contributions most cheaply.

        Args:
            forward: returns the result and what is to be saved, from `x`.
            backward: returns the gradient of `x` (or None, if its last argument says that nobody needs it) and a
                contribution for each operand, from δ, what was saved, and that last argument.
            x: the samples.
            layout: where the samples are in the result.
            operands: the expressions of parameters that take part; None and other tensors are passed over.
        """
        uses = [self.expression(operand) for operand in operands]
        self.expect(expression for expression in uses if expression is not None)
        result: Tensor = Operation.apply(  # type: ignore[no-untyped-call]
            x, self.anchor, self, uses, forward, backward
        )
        return self.follow_as(result, layout)

    def mixed(self, result: Tensor, where: Lost, expressions: Sequence[Expression], refusal: PersampleError) -> Tensor:
        """Return `result`, computed from `expressions` and mixed samples; raises `refusal` if δ reaches it."""
        mixed: Tensor = Mixed.apply(result, self.anchor, refusal)  # type: ignore[no-untyped-call]
        self.layouts[mixed] = where
        return mixed

    def of_nobody(self, operand: Tensor, func: Any) -> Tensor:
        """Return `operand`, computed from parameters, for rows beside those of samples, without an owner.

        It may be read from there, by itself. A gradient that comes back in another way is refused.
        """
        refusal = no_rule(name_of(func), "it puts a parameter beside whole samples")
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
        self.expect([expression])
        self.parameters_repeated = True
        copies: Tensor = Copies.apply(values, self.anchor, self, expression, build)  # type: ignore[no-untyped-call]
        return self.follow_as(copies, layout)

    def receive(self, expression: Expression, contribution: Contribution) -> None:
        """Pass a contribution on to the sink; taps call this in the backward pass."""
        self.sink.receive(expression, contribution)

    # Inner workings.

    def aliased(self, used: list[Tensor], result: Any) -> Any:
        """Return `result`, and remember tensors that share memory with expressions, such as detached ones."""
        memories = {memory_of(self.value(t)) for t in used}
        for tensor in tensors_in((result,)):
            if id(tensor) not in self.expressions and tensor.layout is torch.strided and memory_of(tensor) in memories:
                self.aliases.append(tensor)
        return result

    def expect(self, expressions: Iterable[Expression]) -> None:
        if self.forward_pass:
            for expression in expressions:
                self.sink.expect(expression)

    def _expect_hook(self, hooked: Expression) -> None:
        """Pull gradients back one by one from now on, because a hook may change each of them."""
        if hooked.is_parameter:
            raise hooked_parameter(hooked.names[0])
        if hooked in self.bypassed:
            raise UnsupportedModelError(
                f"A hook was put on a tensor computed from {', '.join(map(repr, hooked.names))} after it was combined "
                "with samples, which backend 'fused' cannot follow: register the hook before that, or use backend "
                "'loop'."
            )
        for _, expression in self.expressions.values():
            if expression.parameters.keys() & hooked.parameters.keys():
                expression.moves, expression.made = False, None


def not_known(operation: str, shape: torch.Size, reason: str) -> UnsupportedModelError:
    """Return the refusal of an operation with a parameter and a tensor whose samples cannot be told apart."""
    return UnsupportedModelError(
        f"{operation} was called with a tensor of shape {tuple(shape)} {reason}: {VMAP_OR_VJP}."
    )


def mixing(reason: str) -> UnsupportedModelError:
    """Return the refusal of losses that depend on several samples."""
    return UnsupportedModelError(
        f"The model or the loss mixes the samples ({reason}), so the gradient of a single sample does not exist. Make "
        "every sample's loss depend on that sample alone."
    )


def lost_track(where: Lost) -> str:
    """Return how errors describe a tensor whose samples cannot be told apart."""
    return f"in which backend 'fused' lost track of the samples ({where.reason})"
