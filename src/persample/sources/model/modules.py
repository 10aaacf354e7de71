"""The modules of a model and what they hold, found quickly: every call walks through them more than once."""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import compress
from typing import Any

from torch import nn


def modules_of(model: nn.Module) -> dict[nn.Module, str]:
    """Return the modules of `model` with their paths: those of `model.named_modules()`, in the same order."""
    found: dict[nn.Module, str] = {}
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if module in found:
            continue
        found[module] = path
        children = module._modules
        if children:
            prefix = f"{path}." if path else ""
            waiting += [(prefix + name, child) for name, child in reversed(children.items()) if child is not None]
    return found


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, by name: those of `model.named_parameters()`, in its order."""
    if type(model).named_parameters is not nn.Module.named_parameters:
        return {name: p for name, p in model.named_parameters() if p.requires_grad}
    found: dict[nn.Parameter, str] = {}
    for module, path in modules_of(model).items():
        for name, p in module._parameters.items():
            if p is not None and p.requires_grad:
                found.setdefault(p, f"{path}.{name}" if path else name)
    return {name: p for p, name in found.items()}


class Types(dict[type, bool]):
    """A cached predicate on types, to filter many values quickly."""

    def __init__(self, holds: Callable[[type], bool]) -> None:
        super().__init__()
        self._holds = holds

    def __missing__(self, kind: type) -> bool:
        self[kind] = self._holds(kind)
        return self[kind]

    def select(self, values: Collection[Any]) -> list[Any]:
        """Return those of `values` for whose type it holds."""
        return list(compress(values, map(self.__getitem__, map(type, values))))
