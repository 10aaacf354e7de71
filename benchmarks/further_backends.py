"""Backends with an option of theirs set, known to the benchmarks only."""

from __future__ import annotations

from typing import Any

from torch import nn

import persample
from persample.sources.backends.fused import FusedSource
from persample.sources.backends.vmap import VmapSource


class ChunkedVmap(VmapSource):
    """`vmap` over 16 samples at a time."""

    def __init__(self, model: nn.Module, loss_fn: Any, *, chunk_size: int = 16, check: Any = "first") -> None:
        super().__init__(model, loss_fn, chunk_size=chunk_size, check=check)


class Eager(FusedSource):
    """`fused` with `compile=False`."""

    def __init__(self, model: nn.Module, loss_fn: Any, *, check: Any = "first") -> None:
        super().__init__(model, loss_fn, compile=False, check=check)


class Replayed(FusedSource):
    """`fused` with `compile=True`."""

    def __init__(self, model: nn.Module, loss_fn: Any, *, check: Any = "first") -> None:
        super().__init__(model, loss_fn, compile=True, check=check)


class ByInductor(FusedSource):
    """`fused` with `compile="inductor"`."""

    def __init__(self, model: nn.Module, loss_fn: Any, *, check: Any = "first") -> None:
        super().__init__(model, loss_fn, compile="inductor", check=check)


def register() -> None:
    """Make them known to `persample.make_source`."""
    persample.register_backend("vmap in chunks", f"{__name__}:ChunkedVmap")
    persample.register_backend("fused, eager", f"{__name__}:Eager")
    persample.register_backend("fused, replayed", f"{__name__}:Replayed")
    persample.register_backend("fused, inductor", f"{__name__}:ByInductor")
