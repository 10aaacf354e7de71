"""Seeing every use of a parameter: a `TorchFunctionMode` that sends each operation on one to a rule.

The mode is active during the forward pass of one call and sees the functions of `torch` by name, so modules need not be
touched: tied weights, functional calls and modules called twice are simply further uses. An operation on a parameter
is run with its detached value, so autograd computes the gradient of its other operands as usual, but never that of the
parameter; a tap at its result delivers δ to the contributions of the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import islice
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from persample.errors import UnsupportedModelError
from persample.sources.contributions import Contribution, precise, without_autocast
from persample.sources.fused import operations
from persample.sources.fused.arguments import substitute, tensors_in
from persample.sources.fused.expressions import Expression
from persample.sources.fused.layout import Layout, Layouts, batch_first, carried, permuted
from persample.sources.fused.places import place_of
from persample.sources.fused.trial import place_by_trial

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
        self.layouts = Layouts()
        # Expressions are few and must outlive their last use, so they are held; parameters are expressions, too.
        self.expressions: dict[int, tuple[Tensor, Expression]] = {}
        device = next((p.device for p in parameters.values()), torch.device("cpu"))
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        for name, p in parameters.items():
            self.expressions[id(p)] = (p, Expression(p.detach(), p, {name: p}, reorders=True))

    def follow(self, tensors: Iterable[Tensor]) -> None:
        """Follow tensors of the batch, whose dim 0 is the sample."""
        for tensor in tensors:
            self.layouts[tensor] = batch_first(tensor, self.batch_size)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_in((*args, *kwargs.values()) if kwargs else args)
        used = [t for t in tensors if id(t) in self.expressions]
        followed = [t for t in tensors if t in self.layouts]
        if not used:
            result = func(*args, **kwargs)
            if followed:
                self._carry(func, args, kwargs, followed, result)
            return result
        if self.forward_pass and any(t.grad_fn is not None and t not in self.layouts for t in tensors):
            raise UnsupportedModelError(
                f"{_name(func)} was called with a parameter and with a result that backend 'fused' did not see come "
                "into being (a custom torch.autograd.Function): use backend 'vmap' or 'loop'."
            )
        if followed or not self.forward_pass:
            return self._use(func, args, kwargs)
        return self._express(func, args, kwargs, used)

    @contextmanager
    def during_backward(self) -> Iterator[None]:
        """Stay active in the backward pass, where activation checkpointing repeats parts of the forward pass."""
        self.forward_pass = False
        with self:
            yield

    # What rules use.

    def expression(self, tensor: Any) -> Expression | None:
        """Return the expression that `tensor` is, or None if it is not made of parameters."""
        entry = self.expressions.get(id(tensor))
        return entry[1] if entry is not None else None

    def value(self, tensor: Any) -> Any:
        """Return `tensor` without its way back to the parameters."""
        expression = self.expression(tensor)
        return tensor if expression is None else expression.value

    def layout(self, tensor: Tensor, operation: str) -> Layout:
        """Return where the samples are in `tensor`.

        Raises:
            UnsupportedModelError: nobody can tell.
        """
        found = self.layouts.get(tensor)
        if found is None and not self.forward_pass and len(tensor) == self.batch_size:
            found = batch_first(tensor, self.batch_size)
        if found is None:
            raise UnsupportedModelError(
                f"{operation} was called with a tensor of shape {tuple(tensor.shape)} in which backend 'fused' lost "
                "track of the samples: keep them in one dimension between the operations that reshape it, or use "
                "backend 'vmap' or 'loop'."
            )
        return found

    def rows_of_sample(self, tensor: Tensor, operation: str) -> int:
        """Return R, where dim 0 of `tensor` has B·R entries, those of a sample side by side.

        Raises:
            UnsupportedModelError: the samples are elsewhere.
        """
        found = self.layout(tensor, operation).dim(tensor.shape)
        if found is None or found[:2] != (0, 1):
            raise UnsupportedModelError(
                f"{operation} was called with a tensor of shape {tuple(tensor.shape)} whose dim 0 is not the sample: "
                "backend 'fused' needs the samples there for this operation. Use backend 'vmap' or 'loop'."
            )
        return found[2]

    def batch_first(self, tensor: Tensor) -> Layout:
        """Return the layout of a tensor whose dim 0 is the sample."""
        return batch_first(tensor, self.batch_size)

    def follow_as(self, tensor: Tensor, layout: Layout) -> Tensor:
        """Follow `tensor` with the given layout, and return it."""
        self.layouts[tensor] = layout
        return tensor

    def fall_back(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run `func` as if it had no rule."""
        return operations.fallback(self, func, args, kwargs)

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
        if not uses:
            return result
        if self.forward_pass:
            for expression, _ in uses:
                self.sink.expect(expression)
        tapped: Tensor = _Tap.apply(  # type: ignore[no-untyped-call]
            result, self.anchor, self.sink, uses, *saved
        )
        self.layouts[tapped] = layout
        return tapped

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
        if self.forward_pass:
            for expression in uses:
                if expression is not None:
                    self.sink.expect(expression)
        result: Tensor = _Operation.apply(  # type: ignore[no-untyped-call]
            x, self.anchor, self.sink, uses, forward, backward
        )
        return self.follow_as(result, layout)

    # Inner workings.

    def _use(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation on samples and expressions of parameters."""
        rule = operations.RULES.get(func)
        opened = _opened(func) if rule is None else None
        try:
            if rule is not None:
                return rule(self, *args, **kwargs)
            if opened is None:
                return operations.fallback(self, func, args, kwargs)
        except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
            func(*args, **kwargs)  # if the call itself is wrong, this raises what PyTorch says of it
            raise operations.no_rule(_name(func), str(error)) from error
        with self:
            return opened(*args, **kwargs)

    def _carry(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], followed: list[Tensor], result: Any
    ) -> None:
        """Follow the samples from the operands into the result of an operation that uses no parameter."""
        for position, output in enumerate(tensors_in((result,))):
            if output in self.layouts:
                continue
            layout = self._layout_after(func, args, kwargs, followed, output)
            unknown = layout is None and self.forward_pass
            if unknown and operations.may_be_tried(func, kwargs, output, self.batch_size):
                layout = self._layout_by_trial(func, args, kwargs, output, position)
            if layout is not None or not self._takes_no_values(func, args):
                self.layouts[output] = layout

    def _takes_no_values(self, func: Any, args: tuple[Any, ...]) -> bool:
        """Whether an operation takes from the samples no more than their shape, dtype or device."""
        return func in operations.CREATES or (func in operations.CONVERTS and args[0] not in self.layouts)

    def _layout_after(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], followed: list[Tensor], output: Tensor
    ) -> Layout | None:
        source = max(followed, key=lambda t: t.dim())
        layout = self.layouts.get(source)
        if layout is None:
            return None
        if operations.moves_rows(func, args, kwargs, source):
            return None
        if func in operations.RESHAPES and output.numel() == source.numel():
            return layout
        if func in operations.PERMUTES:
            order = operations.PERMUTES[func](source, *args[1:], **operations.without_input(kwargs))
            return permuted(layout, source.shape, order)
        if func is torch.einsum:
            return None  # shapes that agree by chance say nothing of where its letters go
        if output.shape == source.shape:
            return layout
        return carried(layout, source.shape, output.shape, behind_first=operations.adds_in_front(func, args, kwargs))

    def _layout_by_trial(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor, position: int
    ) -> Layout | None:
        """The layout of the result at `position`, found by running the operation for one sample."""
        alone = {}
        for tensor in tensors_in((args, kwargs)):
            if tensor in self.layouts:
                layout = self.layouts.get(tensor)
                place = place_of(layout, tensor.shape) if layout is not None else None
                if place is None:
                    return None
                alone[id(tensor)] = place.sample_first(tensor.detach(), self.batch_size)[-1]

        def run_alone() -> Any:
            replaced = substitute((args, kwargs), alone)
            return next(islice(tensors_in((func(*replaced[0], **replaced[1]),)), position, None))

        place = place_by_trial(output, run_alone, self.batch_size)
        return place.layout(output.shape, self.batch_size) if place is not None else None

    def _express(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], used: list[Tensor]) -> Any:
        """Run an operation on parameters and constants, and remember what its result is made of."""
        sources = [self.expressions[id(t)][1] for t in used]
        replaced = substitute((args, kwargs), {id(t): self.expressions[id(t)][1].graph for t in used})
        versions = [source.graph._version for source in sources]
        with torch.enable_grad() if torch.is_grad_enabled() else torch.no_grad():
            result = func(*replaced[0], **replaced[1])
        if [source.graph._version for source in sources] != versions:
            raise UnsupportedModelError(
                f"{_name(func)} changes a parameter, or a tensor computed from parameters, in place, which backend "
                "'fused' cannot follow: use the operation that returns a new tensor."
            )
        if not any(isinstance(r, Tensor) and r.requires_grad for r in tensors_in((result,))):
            return result
        unchanged = {id(source.graph): t for source, t in zip(sources, used, strict=True)}
        parameters = {name: p for source in sources for name, p in source.parameters.items()}
        reorders = len(sources) == 1 and sources[0].reorders and operations.reorders(func, args, kwargs)

        def express(output: Any) -> Any:
            if not isinstance(output, Tensor) or not output.requires_grad:
                return output
            if id(output) in unchanged:  # `contiguous`, `to` and others return what they are given if that will do
                return unchanged[id(output)]
            expanded = sources[0] if operations.expands(func, used[0], output) else None
            value = output.detach()
            self.expressions[id(value)] = (value, Expression(value, output, parameters, reorders, expanded))
            return value

        if isinstance(result, tuple | list):
            return (
                type(result)(*map(express, result))
                if hasattr(result, "_fields")
                else type(result)(map(express, result))
            )
        return express(result)


class _Tap(torch.autograd.Function):
    """The identity, which gives the gradient of its argument to the contributions of the uses."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, anchor: Tensor, sink: Any, uses: Any, *saved: Tensor) -> Tensor:
        # Marked as changed in place, so that the result is no view and may be changed in place afterwards.
        ctx.mark_dirty(result)
        ctx.save_for_backward(*saved)
        ctx.sink, ctx.uses = sink, uses
        return result

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Any, ...]:
        saved = _saved_tensors(ctx)  # where activation checkpointing repeats the forward pass, seen by the mode
        with torch._C.DisableTorchFunction(), without_autocast(delta.device):
            precise_delta = precise(delta)
            saved = tuple(map(precise, saved))
            for expression, build in ctx.uses:
                ctx.sink.receive(expression, build(precise_delta, *saved))
        grads: list[Any] = [None] * (4 + len(saved))
        grads[0] = delta
        return tuple(grads)


class _Operation(torch.autograd.Function):
    """An operation with its own backward pass, which gives the contributions of the uses, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, sink: Any, uses: Any, forward: Any, backward: Any) -> Tensor:
        result: Tensor
        result, saved = forward(x)
        ctx.save_for_backward(*saved)
        ctx.sink, ctx.uses, ctx.own_backward = sink, uses, backward
        return result

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Any, ...]:
        saved = _saved_tensors(ctx)
        with torch._C.DisableTorchFunction():
            gradient, contributions = ctx.own_backward(delta, *saved, ctx.needs_input_grad[0])
            for expression, contribution in zip(ctx.uses, contributions, strict=True):
                if expression is not None:
                    ctx.sink.receive(expression, contribution)
        return gradient, None, None, None, None, None


def _saved_tensors(ctx: Any) -> tuple[Tensor, ...]:
    try:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise UnsupportedModelError(
            "The input of an operation with parameters was changed in place after the operation, so what it saw is "
            f"lost: make that change not in place (inplace=False). {error}"
        ) from error
    return saved


def _name(func: Any) -> str:
    return getattr(func, "__name__", str(func))


@cache
def _opened(func: Any) -> Callable[..., Any] | None:
    """Return a function of `torch.nn.functional` so that its body, not its call, meets the mode; None for others.

    Such a function begins by asking whether anybody overrides it and hands itself over if so. The copy returned here
    looks that question up in its own globals, where the answer is no, so the operations inside are seen.
    """
    if not isinstance(func, FunctionType) or not func.__module__.startswith(
        ("torch.nn.", "torch.functional", "torch.autograd")
    ):
        return None
    asked = {name for name in func.__code__.co_names if name.startswith("has_torch_function")}
    if not asked:
        return None
    answers = dict.fromkeys(asked, _nobody_overrides)
    copy = FunctionType(func.__code__, func.__globals__ | answers, func.__name__, func.__defaults__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def _nobody_overrides(*_: Any) -> bool:
    return False
