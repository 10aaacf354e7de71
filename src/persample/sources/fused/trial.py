"""Finding the samples in the result of an operation by running it once more for the last of them alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from persample.sources.fused.places import Place
from persample.sources.tolerances import tolerance


def place_by_trial(result: Tensor, run_alone: Callable[[], Any], batch: int) -> Place | None:
    """Return where the samples are in `result`.

    Args:
        result: what the operation returned for the batch.
        run_alone: returns what it returns for the last sample alone.
        batch: B.

    Returns:
        None if the last sample alone gives something else than its part of `result`, or if that part can be in
        several places.
    """
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[result.device] if result.is_cuda else []):
            alone = run_alone()
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None
    if not isinstance(alone, Tensor):
        return None
    result, allowed = result.detach(), tolerance(alone)
    found = [
        place
        for place in _candidates(result.shape, alone.shape, batch)
        if torch.allclose(alone, place.sample_first(result, batch)[-1], rtol=allowed, atol=allowed, equal_nan=True)
    ]
    return found[0] if len(found) == 1 else None


def _candidates(shape: Sequence[int], alone: Sequence[int], batch: int) -> Iterator[Place]:
    """Yield the places that the two shapes, of the result and of that for one sample, leave open."""
    if len(shape) != len(alone) or 0 in shape or not shape:
        return
    if batch == 1:
        yield Place(0, 1, shape[0])
        return
    larger = [d for d, (size, one) in enumerate(zip(shape, alone, strict=True)) if size != one]
    if len(larger) == 1 and shape[larger[0]] == batch * alone[larger[0]]:
        folded = alone[larger[0]]
        yield from (Place(larger[0], before, folded // before) for before in {1, folded})
