"""Whether a recorded step gives the numbers of the ordinary way.

Operations that are run one by one must give the same bits. Inductor and CUDA graphs may round otherwise, as far as
the order of additions in a kernel goes, or as far as last bits of the parameters do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import gt
from typing import Any

import torch
from torch import Tensor, nn

from persample.sources.backends.fused.replay.request import taken_apart
from persample.sources.backends.fused.replay.runners import Way

_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
_MOVES, _UNITS = 5, 8  # how often parameters are moved, and by how many units in the last place


def why_other_numbers(
    way: Way | None, ordinary: Any, replayed: Any, again: Callable[[], Any], parameters: Sequence[nn.Parameter]
) -> str:
    """Return why a recorded step may not serve, by its numbers; empty if it may.

    Args:
        way: how the recorded operations were run.
        ordinary: the result of the ordinary way.
        replayed: that of the recorded step.
        again: computes the first once more.
        parameters: those of the model.
    """
    off = _off(ordinary, replayed)
    if way == "operations" and any(off) and not any(_off(ordinary, again())):
        return "the recorded step rounds otherwise"  # and not because every call does
    allowed = [_tolerance(tensor) for tensor in taken_apart(ordinary)[0]]
    if way != "operations" and any(map(gt, off, allowed)):
        # Where a ReLU stands at zero, rounding may change a gradient as much as if the last bits of parameters did.
        for seed in range(_MOVES):
            with _moved(parameters, seed):
                allowed = [max(most, 2 * moved) for most, moved in zip(allowed, _off(ordinary, again()), strict=True)]
    return "the recorded step gives other numbers" if any(map(gt, off, allowed)) else ""


def _off(expected: Any, found: Any) -> list[float]:
    """Return how much the tensors of a result are off, over the largest entry of each."""
    one, other = taken_apart(expected)[0], taken_apart(found)[0]
    return [*map(_off_by, one, other)] if len(one) == len(other) else [math.inf]


def _off_by(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return math.inf
    same = (expected == found) | (expected != expected) & (found != found)  # both are NaN
    if same.all():
        return 0.0
    if not expected.dtype.is_floating_point and not expected.dtype.is_complex:
        return math.inf
    most = (found - expected).masked_fill(same, 0).abs().nan_to_num(math.inf).max().item()
    size = expected.abs().nan_to_num(0.0, 0.0, 0.0).max().item()
    return most / size if size else math.inf


def _tolerance(tensor: Tensor) -> float:
    """How much a result may be off because of the order of additions in a kernel."""
    kind = tensor.dtype if tensor.dtype.is_floating_point or tensor.dtype.is_complex else torch.float32
    return _TOLERANCE.get(kind, 4 * torch.finfo(kind).eps)


@contextmanager
def _moved(parameters: Iterable[nn.Parameter], seed: int) -> Iterator[None]:
    """Let the last bits of parameters be others inside the context."""
    kept = [(p, p.detach().clone()) for p in parameters]
    try:
        for p, values in kept:
            generator = torch.Generator(p.device).manual_seed(seed)
            units = torch.randint(-_UNITS, _UNITS + 1, p.shape, device=p.device, generator=generator).to(p.dtype)
            p.data.copy_(values * (1 + units * torch.finfo(p.dtype).eps))
        yield
    finally:
        for p, values in kept:
            p.data.copy_(values)
