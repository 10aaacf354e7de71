"""The modules of a model, at the cost of one loop: every call walks through them more than once."""

from __future__ import annotations

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
