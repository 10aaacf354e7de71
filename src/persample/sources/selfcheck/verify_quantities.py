"""The self-check of quantities: weighted sums against ordinary gradients, and all quantities of a few samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from persample.dtypes import at_least_float32
from persample.errors import DisagreementError
from persample.quantities.block import Formed
from persample.quantities.computed import Quantities, numbers_in
from persample.quantities.protocol import Quantity, Setting
from persample.quantities.weighted_sum import WeightedSum
from persample.sources.batch import Batch
from persample.sources.contract import Contract
from persample.sources.model.random_state import random_state, random_state_restored
from persample.sources.model.state import state_restored
from persample.sources.selfcheck.oracle import gradient, sample_gradients
from persample.sources.selfcheck.quantity_code import QuantityCode
from persample.sources.selfcheck.returned import ADVICE, name_of
from persample.sources.selfcheck.rounds import QuantitiesOf
from persample.sources.selfcheck.tolerances import Allowance, largest_entry


def verify_quantities(
    source: Contract, batch: Batch, few: Batch, claimed: Quantities, losses: Tensor, allowance: Allowance
) -> None:
    """Raise if `claimed` does not follow from ordinary gradients.

    Of the whole batch, a sum with random weights must be the ordinary gradient of that sum of the losses. Of a few
    samples, each quantity must be what it is of the gradients that the loop gives. Random numbers and state are those
    from which the call began, and are left so.

    Raises:
        DisagreementError: something differs by more than rounding.
    """
    _require_close(source, "losses", claimed.losses, losses, allowance)
    weights = 0.5 + torch.rand(batch.size, device="cpu", generator=torch.Generator().manual_seed(0)).to(losses)
    start = random_state(source.model)
    with state_restored(source.state()), random_state_restored(source.model, start):
        found = QuantitiesOf([WeightedSum(weights)])(source, batch).weighted_sum
    with state_restored(source.state()), random_state_restored(source.model, start):
        expected = gradient((weights * source.losses(batch)).sum(), source)
    _require_close(source, "weighted sum of the gradients", found.gradient, expected, allowance, batch.size)

    if claimed.groups is not None:  # quantities are made for as many gradients as there are groups
        few = few.take(slice(0, len(claimed.groups)))
    asked = [of_size(quantity, few.size) for quantity in claimed.asked]
    with state_restored(source.state()), random_state_restored(source.model, start):
        of_few = QuantitiesOf(asked)(source, few)
    with state_restored(source.state()), random_state_restored(source.model, start):
        _, rows = sample_gradients(source, few, range(few.size))
        gradients = list(rows)
    parameters = {name: p.detach() for name, p in source.parameters().items()}
    for quantity, result in zip(asked, of_few.results, strict=True):
        due = _of_rows(quantity, parameters, gradients)
        _require_close(source, f"quantity {quantity.name!r}", result, due, allowance, few.size)


def _of_rows(quantity: Quantity[Any], parameters: dict[str, Tensor], gradients: list[dict[str, Tensor]]) -> Any:
    """Return a quantity of given gradients."""
    accumulation = QuantityCode(quantity, Setting(len(gradients), parameters))
    blocks = [
        Formed(name, 0, len(gradients), at_least_float32(torch.stack([row[name] for row in gradients])))
        for name in parameters
    ]
    more = True
    while more:
        for block in blocks:
            accumulation.add(block)
        more = accumulation.another_round()
    return accumulation.result()


def of_size(quantity: Quantity[Any], size: int) -> Quantity[Any]:
    """Return a quantity for a batch of `size`; quantities with values per sample say how."""
    changed: Any = getattr(quantity, "of_size", None)
    fitting: Quantity[Any] = quantity if changed is None else changed(size)
    return fitting


def _require_close(
    source: Contract, what: str, claimed: Any, expected: Any, allowance: Allowance, samples: int = 0
) -> None:
    found, due = list(numbers_in(claimed)), list(numbers_in(expected))
    largest = max((largest_entry(value) for _, _, value in due), default=0.0)
    for (where, key, value), (_, _, claim) in zip(due, found, strict=True):
        other = claim.to(value)
        names = [key] if key in source.parameters() else ["", *allowance.left]
        floor = max(allowance.difference(name, 0.0, largest, samples) for name in names)
        # Squares have twice the relative error of the gradients, and sums over n numbers of size e have √n e.
        floor *= max(1.0, value.numel() ** 0.5)
        allowed = 4 * allowance.relative * largest_entry(value) + floor
        difference = largest_entry(other - value)
        if difference > allowed or bool((other.isnan() != value.isnan()).any()):
            raise DisagreementError(
                f"Backend {name_of(source)} is wrong on this model: the {what}{where} differs from that of ordinary "
                f"gradients by {difference:.3g}, where its largest entry is {largest_entry(value):.3g}. {ADVICE}"
            )
