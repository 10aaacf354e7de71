"""Taps: autograd functions that pass gradients of the backward pass on to the contributions of parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Protocol

import torch
from torch import Tensor

from persample.dtypes import without_autocast
from persample.errors import UnsupportedModelError
from persample.sources.backends.contributions import Contribution, precise
from persample.sources.backends.fused.expressions import Expression
from persample.sources.model.refusals import VMAP_OR_VJP
from persample.sources.selfcheck.oracle import inner_backward_pass
from persample.sources.selfcheck.raw_errors import is_raw
from persample.sources.selfcheck.returned import ADVICE

Backward = Callable[[Any, Tensor], tuple[Any, ...]]

#: Makes the contribution of one use from δ and what was saved.
Build = Callable[..., Contribution]


class Receiver(Protocol):
    """What taps need from the trace."""

    forward_pass: bool
    passed_by: str
    in_outer_backward: Callable[[], bool]

    def receive(self, expression: Expression, contribution: Contribution) -> None: ...

    def inner_gradient(self) -> Tensor: ...


def _in_words(backward: Backward) -> Backward:
    """Return a backward pass that names the parameters where anything fails."""

    @wraps(backward)
    def named(ctx: Any, delta: Tensor) -> tuple[Any, ...]:
        try:
            return backward(ctx, delta)
        except Exception as error:
            if not is_raw(error):
                raise
            names = [name for expression in ctx.expressions if expression is not None for name in expression.names]
            raise UnsupportedModelError(
                f"Backend 'fused' failed in the gradient of {', '.join(map(repr, names))} ({type(error).__name__}: "
                f"{error}). {ADVICE}"
            ) from error

    return named


class Tap(torch.autograd.Function):
    """The identity; passes its gradient on to the contributions of the uses."""

    @staticmethod
    def forward(
        ctx: Any,
        result: Tensor,
        anchor: Tensor,
        trace: Receiver,
        uses: Sequence[tuple[Expression, Build]],
        *saved: Tensor,
    ) -> Tensor:
        # Marked as changed in place, so that the result is no view and may be changed in place afterwards.
        ctx.mark_dirty(result)
        ctx.save_for_backward(*saved)
        ctx.trace, ctx.uses, ctx.repeats = trace, uses, not trace.forward_pass
        ctx.expressions = [expression for expression, _ in uses]
        ctx.count = len(saved)
        return result

    @staticmethod
    @_in_words
    def backward(ctx: Any, delta: Tensor) -> tuple[Any, ...]:
        others = [None] * (2 + ctx.count)
        if not _is_for_parameters(ctx):
            return delta, ctx.trace.inner_gradient(), *others
        saved = _saved_tensors(ctx)  # where activation checkpointing repeats the forward pass, seen by the mode
        with torch._C.DisableTorchFunction(), without_autocast(delta.device):
            precise_delta = precise(delta)
            saved = tuple(map(precise, saved))
            for expression, build in ctx.uses:
                ctx.trace.receive(expression, build(precise_delta, *saved))
        return delta, None, *others


class Operation(torch.autograd.Function):
    """An operation with its own backward pass, which also computes the contributions of the uses."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor,
        trace: Receiver,
        uses: Sequence[Expression | None],
        forward: Any,
        backward: Any,
    ) -> Tensor:
        result: Tensor
        result, saved = forward(x)
        ctx.save_for_backward(*saved)
        ctx.trace, ctx.expressions, ctx.own_backward = trace, uses, backward
        ctx.repeats = not trace.forward_pass
        return result

    @staticmethod
    @_in_words
    def backward(ctx: Any, delta: Tensor) -> tuple[Any, ...]:
        wanted = _is_for_parameters(ctx)
        saved = _saved_tensors(ctx)
        with torch._C.DisableTorchFunction():
            gradient, contributions = ctx.own_backward(delta, *saved, ctx.needs_input_grad[0])
            for expression, contribution in zip(ctx.expressions, contributions, strict=True):
                if expression is not None and wanted:
                    ctx.trace.receive(expression, contribution)
        return gradient, None if wanted else ctx.trace.inner_gradient(), None, None, None, None


class Copies(torch.autograd.Function):
    """Values of an expression that enter the samples' graph; their gradient goes to its contribution."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, anchor: Tensor, trace: Receiver, expression: Expression, build: Build
    ) -> Tensor:
        ctx.trace, ctx.expressions, ctx.build = trace, [expression], build
        ctx.repeats = not trace.forward_pass
        return values

    @staticmethod
    @_in_words
    def backward(ctx: Any, delta: Tensor) -> tuple[Any, ...]:
        if not _is_for_parameters(ctx):
            return None, ctx.trace.inner_gradient(), None, None, None
        with torch._C.DisableTorchFunction(), without_autocast(delta.device):
            ctx.trace.receive(ctx.expressions[0], ctx.build(precise(delta)))
        return None, None, None, None, None


class Mixed(torch.autograd.Function):
    """The identity, for tensors computed from parameters and several samples at once: refuses a gradient."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, anchor: Tensor, refusal: UnsupportedModelError) -> Tensor:
        ctx.refusal = refusal
        return result.clone()

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Any, ...]:
        raise ctx.refusal


def _is_for_parameters(ctx: Any) -> bool:
    """Whether the arriving gradient is that of the losses, not of a derivative inside the model.

    Raises:
        UnsupportedModelError: it is computed in the forward pass, where it could be differentiated once more; or the
            operation was run in the backward pass, where activation checkpointing may repeat it, and no more.
    """
    if ctx.trace.forward_pass:
        raise second_derivatives()
    name = next(expression.names[0] for expression in ctx.expressions if expression is not None)
    if ctx.repeats:
        raise inner_backward_pass(name)
    if ctx.trace.in_outer_backward():
        return True
    ctx.trace.passed_by = name
    return False


def second_derivatives() -> UnsupportedModelError:
    """Return the refusal of a model that differentiates in its forward pass."""
    return UnsupportedModelError(
        "The model or the loss computes gradients itself (torch.autograd.grad: derivatives by inputs or parameters, "
        f"a gradient penalty), and backend 'fused' does not support second derivatives: {VMAP_OR_VJP}."
    )


def _saved_tensors(ctx: Any) -> tuple[Tensor, ...]:
    try:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise UnsupportedModelError(
            "The input of an operation with parameters was changed in place after the operation, so its value is "
            f"lost: make that change out of place (inplace=False). {error}"
        ) from error
    return saved
