"""Draws from the Gaussian posterior, and the way back to the mean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from persample.vogn.core import Tensors


def draw(mean: Tensors, scale: Tensors, generator: torch.Generator | None) -> Tensors:
    """Return w = μ + σ ∘ ε with ε ~ N(0, I).

    The noise comes tensor by tensor, in order, from `generator` on its own device, or from PyTorch's global generator
    of the tensor's device: whatever computes gradients afterwards, the same seed gives the same weights.
    """
    noise = [
        torch.randn(s.shape, dtype=s.dtype, device=generator.device if generator else s.device, generator=generator).to(
            s.device
        )
        for s in scale
    ]
    return torch._foreach_addcmul(mean, scale, noise)


@contextmanager
def restored(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield copies of `tensors`, and write them back at the end, bit for bit, whatever happened in between.

    The values are copied in place, no storage is swapped: views, optimizers and other processes that hold the tensors
    keep seeing them.
    """
    with torch.no_grad():
        saved = [t.clone() for t in tensors]
    try:
        yield saved
    finally:
        with torch.no_grad():
            torch._foreach_copy_(tensors, saved)
