"""How many samples to take at a time, and the sums over them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

Sums = tuple[Tensor, Tensor]


def samples_at_once(numbers: int, device: torch.device, budget: int = 2**20) -> int:
    """Return the chunk size for a computation that needs `numbers` temporary numbers per sample.

    On a CPU about `budget` numbers stay in the cache. Elsewhere each operation costs a launch, and must be large to
    keep the processor busy, so there are 2²⁶ of them: 256 MiB in float32.
    """
    if device.type != "cpu":
        budget = 2**26
    return max(1, budget // max(1, numbers))


def squares_of(g: Tensor, dim: int = 0) -> Tensor:
    """Return Σ_i g_i² over the samples; overwrites its argument."""
    if g.is_cuda:
        norms: Tensor = torch.linalg.vector_norm(g, dim=dim)  # reads them once, and writes none
        return norms.square()
    return g.square_().sum(dim)


def added_up(gradients: Iterable[Tensor], dim: int = 0, norms: list[Tensor] | None = None) -> Sums:
    """Return Σ_i g_i and Σ_i g_i² from pieces of the g_i, which may be overwritten; `dim` is that of the samples.

    Those who want ‖g_i‖², too, give a list, to which those of each piece are appended.
    """
    total = squares = None
    for g in gradients:
        if norms is not None:
            norms.append(squared_norms(g, dim))
        if total is None or squares is None:
            total, squares = g.sum(dim), squares_of(g, dim)
        elif g.shape[dim] == 1:
            total += g.select(dim, 0)
            squares.addcmul_(g.select(dim, 0), g.select(dim, 0))
        else:
            total += g.sum(dim)
            squares += squares_of(g, dim)
    assert total is not None  # a batch has samples
    assert squares is not None
    return total, squares


def squared_norms(g: Tensor, dim: int = 0) -> Tensor:
    """Return ‖g_i‖² of per-sample gradients; `dim` is that of the samples."""
    norms: Tensor = torch.linalg.vector_norm(g, dim=[d for d in range(g.dim()) if d != dim])
    return norms.square()
