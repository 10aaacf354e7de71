"""Calling functions of `torch.nn.functional` so that the capture sees the operations inside."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any


@cache
def opened(func: Any) -> Callable[..., Any] | None:
    """Return a function of `torch.nn.functional` whose body, not whose call, is seen by the mode; None for others.

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
