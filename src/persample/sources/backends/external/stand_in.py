"""A stand-in for a model: copies of its modules with the same parameters and buffers, for a package to modify."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from operator import is_
from types import MethodType
from typing import Any

from torch import nn

from persample.sources.model.modules import modules_of

#: The stand-in of each module.
Copies = Mapping[nn.Module, nn.Module]

# How deep containers are searched for modules, and how long those are that are searched.
_DEPTH = 4
_LENGTH = 1000

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)


@contextmanager
def stand_in(model: nn.Module) -> Iterator[Copies]:
    """Yield a copy of each module of `model`; the copy of `model` itself computes the same function.

    A copy has the parameters, the buffers and all else that the module holds, but no hooks; where the module holds
    other modules, also in lists, bound methods and the like, it holds their copies. Hooks, attributes and flags that
    are put on the copies are not put on `model`. They are made in the time of some hooks, so make them for each call:
    then they are never out of date. Functions that hold a module by a closure still run the module itself.
    """
    copies = _copies(model)
    try:
        yield copies
    finally:
        # Hooks may hold what was put around the stand-in, which holds the stand-in: a circle.
        for copy in copies.values():
            vars(copy).update(_without_hooks())


def _copies(model: nn.Module) -> Copies:
    modules = modules_of(model)
    copies = {module: object.__new__(type(module)) for module in modules}
    for module in modules:
        copies[module] = copies[_uncompiled(module)]
    for module in modules:
        copy = copies[module]
        if _uncompiled(module) is module:
            vars(copy).update({name: _with_copies(value, copies) for name, value in vars(module).items()})
            vars(copy).update(_parameters=module._parameters, _buffers=module._buffers, _compiled_call_impl=None)
            vars(copy).update(_without_hooks())
    return copies


def _uncompiled(module: nn.Module) -> nn.Module:
    """Return the module inside one that `torch.compile` returned: its copies would still run the original."""
    while "dynamo_ctx" in vars(module) and "_orig_mod" in module._modules:
        module = module._modules["_orig_mod"]  # type: ignore[assignment]
    return module


def _without_hooks() -> dict[str, Any]:
    return {"_is_full_backward_hook": None, **{name: OrderedDict() for name in _HOOKS}}


def _with_copies(value: Any, copies: Copies, depth: int = _DEPTH) -> Any:
    """Return `value` with modules replaced by their copies; `value` itself if it holds none."""
    if isinstance(value, nn.Module):
        return copies.get(value, value)
    kind = type(value)
    if kind is MethodType:
        owner = _with_copies(value.__self__, copies, 0)
        return value if owner is value.__self__ else MethodType(value.__func__, owner)
    if kind is partial and depth > 0:
        held = (value.func, value.args, value.keywords)
        func, args, keywords = (_with_copies(part, copies, depth - 1) for part in held)
        return value if all(map(is_, (func, args, keywords), held)) else partial(func, *args, **keywords)
    if kind not in (dict, OrderedDict, list, tuple) or depth == 0 or len(value) > _LENGTH:
        return value
    entries = value.values() if kind in (dict, OrderedDict) else value
    new = [_with_copies(entry, copies, depth - 1) for entry in entries]
    if all(map(is_, new, entries)):
        return value
    return kind(zip(value, new, strict=True)) if kind in (dict, OrderedDict) else kind(new)
