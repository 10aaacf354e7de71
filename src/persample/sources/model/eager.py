"""Running compiled models eagerly, so that their operations can be seen, and keeping Dynamo out of the package."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

from persample.errors import UsageError

_Function = TypeVar("_Function", bound=Callable[..., Any])
_frames: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)

_stance_outside: ContextVar[str | None] = ContextVar("stance_outside", default=None)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run modules compiled by `torch.compile` eagerly inside the context.

    Where TorchDynamo was never imported, which takes seconds, nothing can have been compiled.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    token = _stance_outside.set(_stance_outside.get() or _stance())
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        _stance_outside.reset(token)


def compiling_is_off() -> bool:
    """Whether the user has told PyTorch to compile nothing: by its stance, its configuration, or the environment."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return os.environ.get("TORCHDYNAMO_DISABLE") == "1"
    return bool(dynamo.config.disable) or (_stance_outside.get() or _stance()) == "force_eager"


def _stance() -> str:
    stances: Any = sys.modules["torch._dynamo.eval_frame"]
    return str(getattr(getattr(stances, "_stance", None), "stance", "default"))


def not_compiled(function: _Function) -> _Function:
    """Let Python run a function, and all that it calls, where a user compiles what calls it.

    It does what `torch.compiler.disable` does, without importing TorchDynamo, and calls cost nothing.
    """
    return _marked(function, "SKIP")


def _looks_out(function: _Function) -> _Function:
    """Let Python run a function, which can see then whether what calls it is compiled."""
    return _marked(function, "DEFAULT")


def _marked(function: _Function, action_below: str) -> _Function:
    if hasattr(_frames, "set_code_exec_strategy"):  # since PyTorch 2.7
        reason = "persample runs model and backward pass itself: call it without fullgraph=True"
        vars(function).update(_torchdynamo_disable=True, _torchdynamo_disable_msg=reason)
        action = _frames._FrameAction
        strategy = _frames._FrameExecStrategy(action.SKIP, getattr(action, action_below))
        _frames.set_code_exec_strategy(function.__code__, strategy)
    return function


@_looks_out
def refuse_compiled(call: str) -> None:
    """Raise if what calls this is compiled.

    Args:
        call: begins a block, whose rest would be compiled, too.

    Raises:
        UsageError: it is.
    """
    if hasattr(_frames, "get_eval_frame_callback") and _frames.get_eval_frame_callback() not in (None, False):
        raise UsageError(
            f"{call} cannot begin a block in a function that is compiled by torch.compile: it changes the model and "
            "looks at each operation, which compiled code does not show. Leave that function uncompiled (the model "
            "itself may be compiled), or call observe() or moments(), which may stand in a compiled function."
        )
