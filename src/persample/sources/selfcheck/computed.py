"""Running a backend, and the self-check if it is due."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from persample.errors import DisagreementError, UnsupportedModelError
from persample.sources.batch import Batch
from persample.sources.contract import Contract
from persample.sources.model.isolation import parameters_counted, parameters_guarded
from persample.sources.model.random_state import random_state, random_state_restored
from persample.sources.model.state import State, state_restored
from persample.sources.selfcheck.returned import moments_of, uses_of
from persample.sources.selfcheck.rounding import only_rounded
from persample.sources.selfcheck.verify import refuse_nonlinear_backward, refuse_slight_mixing, verify

#: `moments_of`, `per_sample_of`, or quantities.
Compute = Callable[[Contract, Batch], Any]


def computed(source: Contract, batch: Batch, compute: Compute, state: State, checking: bool) -> Any:
    """Compute, handle the state, and check the result if a check is due.

    Args:
        source: the backend.
        batch: the batch.
        compute: what is asked for.
        state: that of the model before.
        checking: whether the self-check is due.
    """
    before = random_state(source.model)
    with parameters_counted(source.model), parameters_guarded(source.model) if checking else nullcontext():
        result = compute(source, batch)
        if not source.ordinary_state and source.state_changed(state):
            state.put_back()
            with random_state_restored(source.model, before):
                source.losses(batch)
    if source.moving is None:
        moved = {id(p) for p in state.moved()}
        source.moving = {name for name, p in source.model.named_parameters() if id(p) in moved}
    if checking:
        ran = source.ran, source.ran_because
        with state_restored(source.state()):
            state.put_back()  # the check repeats the forward pass from where it began
            try:
                verify(source, batch, result, before)
            except DisagreementError as disagreement:
                if not only_rounded(source, batch, compute, result, before):
                    refuse_nonlinear_backward(source, batch, before)
                    refuse_slight_mixing(source, batch, before)
                    with random_state_restored(source.model, before):
                        _refuse_uses(source, batch, disagreement)
                    raise
        source.ran, source.ran_because = ran  # the check asks for more, which may be served in another way
    return result


def _refuse_uses(source: Contract, batch: Batch, disagreement: DisagreementError) -> None:
    """Raise `UnsupportedModelError` if any single use of a parameter is refused.

    It is the reason why the result is wrong. The look costs more than a call, so each call does without it.
    """
    for use in uses_of(source, batch):
        if use.kind == "refused":
            raise UnsupportedModelError(use.why) from disagreement


def check_once(
    source: Contract,
    batch: Batch,
    loss_fn: Callable[[Any, Any], Tensor],
    method: str = "recording",
    computes: Sequence[Compute] = (moments_of,),
) -> None:
    """Run the self-check on `batch` with another loss, if it is due for its kind and `method`.

    What `computes` asks for is computed, and checked.

    Nothing remains of it, no random number is used up.

    Raises:
        DisagreementError, UnsupportedModelError: what the self-check found.
    """
    if not source.check_is_due(batch, method):
        return
    source.moving = None
    with source.with_loss(loss_fn, random_state(source.model)) as checked:
        for compute in computes:
            computed(checked, batch, compute, checked.state(), checking=True)
    source.moving = checked.moving
    if batch.size > 1:
        source.checked.add(source.kind_of(batch, method))
