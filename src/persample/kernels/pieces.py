"""How many samples to take at a time, and the sums over them."""

from __future__ import annotations

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
