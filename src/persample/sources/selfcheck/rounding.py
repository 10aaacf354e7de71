"""A second look at results that failed the self-check: can rounding explain the difference?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from persample.errors import PersampleError
from persample.sources.batch import Batch
from persample.sources.contract import Contract
from persample.sources.model.random_state import RandomState, random_state_restored
from persample.sources.selfcheck.oracle import gradient, sample_gradients
from persample.sources.selfcheck.perturbation import rounding_left
from persample.sources.selfcheck.tolerances import MOVED, least_precise
from persample.sources.selfcheck.verify import Result, repeating, some_samples, verify


def only_rounded(
    source: Contract,
    batch: Batch,
    compute: Callable[[Contract, Batch], Any],
    result: Result,
    before: RandomState,
) -> bool:
    """Whether `result` failed `verify` because of rounding alone.

    It must be right on a copy of the model and batch in float64, and what it returned may be off by `MOVED`; both but
    for gradients that vanish in exact arithmetic.

    Args:
        source: the backend.
        batch: what it was given.
        compute: the function that gave `result`.
        result: what it returned.
        before: the state of the random numbers before.
    """
    try:
        verify(source, batch, result, before, MOVED, _rounding_left(source, batch, before))
        twin = copy.deepcopy(source)
        twin.model.double()
        precise = batch.double()
        with random_state_restored(source.model, before):
            verify(twin, precise, compute(twin, precise), before, 0.0, _rounding_left(twin, precise, before))
    except (PersampleError, RuntimeError, TypeError, ValueError, AttributeError):
        # It is wrong there too; or the model cannot be copied, or not run in float64.
        return False
    return True


def _rounding_left(source: Contract, batch: Batch, before: RandomState) -> dict[str, float]:
    """The rounding in a sample's gradient, where it is zero for all compared samples."""
    few = some_samples(batch)
    with repeating(source, before):
        dtype = least_precise(source.losses(batch))

    def gradients(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
        moved, like = copy.copy(source), batch.with_inputs(*inputs)
        moved.model = model
        with repeating(moved, before):
            mean = {name: g / batch.size for name, g in gradient(moved.losses(like).sum(), moved).items()}
        with repeating(moved, before):
            rows = [mean, *sample_gradients(moved, like, few)[1]]
        return {name: torch.stack([row[name] for row in rows]) for name in mean}

    return rounding_left(source.model, batch.inputs(), gradients, dtype)
