"""Running compiled models eagerly, so that their operations can be seen."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run modules compiled by `torch.compile` eagerly inside the context.

    Where TorchDynamo was never imported, which takes seconds, nothing can have been compiled.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
