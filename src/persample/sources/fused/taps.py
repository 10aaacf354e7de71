"""Where gradients are taken from autograd's backward pass and given to the contributions of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from persample.errors import UnsupportedModelError
from persample.sources.contributions import precise, without_autocast
from persample.sources.fused.expressions import Expression
from persample.sources.reference import inner_backward_pass


class Tap(torch.autograd.Function):
    """The identity, which gives the gradient of its argument to the contributions of the uses."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, anchor: Tensor, capture: Any, uses: Any, *saved: Tensor) -> Tensor:
        # Marked as changed in place, so that the result is no view and may be changed in place afterwards.
        ctx.mark_dirty(result)
        ctx.save_for_backward(*saved)
        ctx.capture, ctx.uses, ctx.repeats = capture, uses, not capture.forward_pass
        return result

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Any, ...]:
        _refuse_inner_pass(ctx, [expression for expression, _ in ctx.uses])
        saved = _saved_tensors(ctx)  # where activation checkpointing repeats the forward pass, seen by the mode
        with torch._C.DisableTorchFunction(), without_autocast(delta.device):
            precise_delta = precise(delta)
            saved = tuple(map(precise, saved))
            for expression, build in ctx.uses:
                ctx.capture.receive(expression, build(precise_delta, *saved))
        grads: list[Any] = [None] * (4 + len(saved))
        grads[0] = delta
        return tuple(grads)


class Operation(torch.autograd.Function):
    """An operation with its own backward pass, which gives the contributions of the uses, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, capture: Any, uses: Any, forward: Any, backward: Any) -> Tensor:
        result: Tensor
        result, saved = forward(x)
        ctx.save_for_backward(*saved)
        ctx.capture, ctx.uses, ctx.own_backward = capture, uses, backward
        ctx.repeats = not capture.forward_pass
        return result

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Any, ...]:
        _refuse_inner_pass(ctx, [expression for expression in ctx.uses if expression is not None])
        saved = _saved_tensors(ctx)
        with torch._C.DisableTorchFunction():
            gradient, contributions = ctx.own_backward(delta, *saved, ctx.needs_input_grad[0])
            for expression, contribution in zip(ctx.uses, contributions, strict=True):
                if expression is not None:
                    ctx.capture.receive(expression, contribution)
        return gradient, None, None, None, None, None


class Copies(torch.autograd.Function):
    """Values of an expression that enter the samples' graph; their gradient goes to its contribution."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, anchor: Tensor, capture: Any, expression: Any, build: Any) -> Tensor:
        ctx.capture, ctx.expression, ctx.build = capture, expression, build
        ctx.repeats = not capture.forward_pass
        return values

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Any, ...]:
        _refuse_inner_pass(ctx, [ctx.expression])
        with torch._C.DisableTorchFunction(), without_autocast(delta.device):
            ctx.capture.receive(ctx.expression, ctx.build(precise(delta)))
        return None, None, None, None, None


class Mixed(torch.autograd.Function):
    """The identity, for what was made of parameters and of several samples at once: a gradient is refused."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, anchor: Tensor, refusal: UnsupportedModelError) -> Tensor:
        ctx.refusal = refusal
        return result.clone()

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Any, ...]:
        raise ctx.refusal


def _refuse_inner_pass(ctx: Any, expressions: Sequence[Expression]) -> None:
    """Raise if the operation was run in the backward pass: activation checkpointing repeats it there, and no more."""
    if ctx.repeats:
        raise inner_backward_pass(expressions[0].names[0])


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
