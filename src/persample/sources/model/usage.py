"""One use of a parameter in the forward pass, and what would serve it, for `persample.explain`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

Kind = Literal["rule", "fallback", "refused"]


@dataclass(frozen=True)
class Use:
    """One use of a parameter, and what would serve it.

    Attributes:
        parameter: its name; None if the whole model is concerned.
        kind: `"rule"`, `"fallback"` (exact too, but slower), or `"refused"`.
        by: the layer or operation that uses it, and the rule that serves it.
        module: path of the module in which that happens.
        why: the reason and what to do, if it is refused.
    """

    parameter: str | None
    kind: Kind
    by: str
    module: str
    why: str = ""


@contextmanager
def current_module(model: nn.Module) -> Iterator[Callable[[], str]]:
    """Yield a function that returns the path of the innermost module whose forward pass is running."""
    running = [""]

    def enter(path: str) -> Any:
        return lambda module, args: running.append(path)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    handles = []
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # takes no such hooks
            continue
        handles.append(module.register_forward_pre_hook(enter(path), prepend=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield lambda: running[-1]
    finally:
        for handle in handles:
            handle.remove()
