"""Registering the package's operators with PyTorch: `torch.ops.persample.NAME`.

An operator has a schema, results without values for tensors without values, and forms in PyTorch's own operations that
run on every device. Whatever records a step sees it as one operation, however many it takes. It lies below autograd:
its results have no gradients. A device may have a faster implementation, `LIBRARY.impl(NAME, function, "CUDA")`, which
takes what suits it and leaves the rest to `ON_ANY_DEVICE[NAME]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

LIBRARY = torch.library.Library("persample", "DEF")

#: The implementations in PyTorch's own operations.
ON_ANY_DEVICE: dict[str, Callable[..., Any]] = {}


Function = TypeVar("Function", bound=Callable[..., Any])


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Function], Function]:
    """Return a decorator that makes an operator of its implementation.

    `torch.library.custom_op` would do, too, at four times the overhead of each call.

    Args:
        schema: name, arguments and results, as `torch.library.define` takes them.
        fake: called with the same arguments; returns tensors like the results, and raises where shapes are wrong. They
            lie in memory in order, and so do the results, as what is compiled for them relies on it.
    """

    def made(function: Function) -> Function:
        name = schema.partition("(")[0]
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
        LIBRARY.impl(name, in_order(function), "CompositeExplicitAutograd")
        torch.library.register_fake(f"persample::{name}", fake, lib=LIBRARY)
        ON_ANY_DEVICE[name] = function
        overload: Function = getattr(torch.ops.persample, name).default
        return overload

    return made


def in_order(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return an implementation whose results lie in memory in order, whatever those of `function` do."""

    def run(*arguments: Any) -> Any:
        results = function(*arguments)
        if results is None:  # it writes to its arguments
            return None
        return results.contiguous() if isinstance(results, Tensor) else tuple([r.contiguous() for r in results])

    return run
