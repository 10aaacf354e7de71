"""`vmap` in chunks: a further backend, known to the benchmarks only."""

from __future__ import annotations

from typing import Any

from torch import nn

import persample
from persample.sources.backends.vmap import VmapSource


class ChunkedVmap(VmapSource):
    """`vmap` over 16 samples at a time."""

    def __init__(self, model: nn.Module, loss_fn: Any, *, chunk_size: int = 16, check: Any = "first") -> None:
        super().__init__(model, loss_fn, chunk_size=chunk_size, check=check)


def register() -> None:
    """Make it known to `persample.make_source`."""
    persample.register_backend("vmap in chunks", f"{__name__}:ChunkedVmap")
