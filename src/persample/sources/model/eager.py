"""Running compiled models eagerly, so that their operations can be seen."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

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
    frames: Any = sys.modules["torch._dynamo.eval_frame"]
    return str(getattr(getattr(frames, "_stance", None), "stance", "default"))
