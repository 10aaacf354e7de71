"""Leaving no trace: everything that a model holds is restored, except the state that a forward pass may change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from persample.errors import UnsupportedModelError
from persample.sources.model.state import State


@contextmanager
def untouched(model: nn.Module, frozen: Iterable[nn.Parameter] = ()) -> Iterator[State]:
    """Restore everything but the state of `model` afterwards; after an exception, the state too.

    Gradients, hooks, attributes of parameters and the training flags are as before, whatever happens inside. Inside,
    every `p.grad` is None. The state keeps what was changed in it, unless an exception passes through.

    Args:
        model: the network.
        frozen: those of its parameters without gradient that its forward pass may move.
    """
    state = State(model, frozen)
    gradients = [(p, p.grad) for p in state.parameters]
    failed = True
    try:
        for parameter, gradient in gradients:
            if gradient is not None:
                parameter.grad = None
        yield state
        failed = False
    finally:
        if failed:
            state.put_back()
        else:
            state.carry_on()
        for parameter, gradient in gradients:
            if parameter.grad is not gradient:
                parameter.grad = gradient


@contextmanager
def parameters_guarded(model: nn.Module) -> Iterator[None]:
    """Restore trained parameters that the forward pass itself rewrites, and refuse the model.

    Raises:
        UnsupportedModelError: a parameter that requires a gradient has other values, or any has another
            `requires_grad`, than before.
    """
    before = dict(model.named_parameters())
    flags = {name: p.requires_grad for name, p in before.items()}
    saved = {name: p.detach().clone() for name, p in before.items() if p.requires_grad}

    def put_back() -> list[str]:
        """Return the names of those that had changed."""
        changed = []
        for name, p in before.items():
            moved = name in saved and not _same(p.detach(), saved[name])
            if moved or p.requires_grad != flags[name]:
                changed.append(name)
                p.requires_grad_(flags[name])
            if moved:
                with torch.no_grad():
                    p.copy_(saved[name])
        return changed

    try:
        yield
    except BaseException as error:
        if (changed := put_back()) and isinstance(error, Exception):
            raise _rewriting(changed[0]) from error
        raise
    if changed := put_back():
        raise _rewriting(changed[0])


@contextmanager
def parameters_counted(model: nn.Module) -> Iterator[None]:
    """Refuse a model whose forward pass creates parameters.

    Raises:
        UnsupportedModelError: there is one more than before, or another one in the place of one.
    """
    before = dict(model.named_parameters())

    def refuse(cause: Exception | None = None) -> None:
        for name, parameter in model.named_parameters():
            if name not in before:
                raise UnsupportedModelError(
                    f"The model's forward pass creates the parameter {name!r}: run one forward pass of the model "
                    "first, so that all parameters exist."
                ) from cause
            if parameter is not before[name]:
                raise UnsupportedModelError(
                    f"The model's forward pass replaces its parameter {name!r} by a new nn.Parameter: copy the new "
                    "values into the existing one (copy_ under torch.no_grad()), or make it a buffer."
                ) from cause

    try:
        yield
    except Exception as error:
        refuse(error)
        raise
    refuse()


def _rewriting(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The model's forward pass rewrites its own parameter {name!r}: the gradients would belong to other weights "
        "than the model's. Move that out of the forward pass (max_norm, clamping, an update)."
    )


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first.nan_to_num(), second.nan_to_num())
