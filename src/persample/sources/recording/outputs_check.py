"""The self-check of a recorded pass: on its batch, with a loss that is linear in the outputs of the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from persample.sources.contract import Contract
from persample.sources.model.state import state_restored
from persample.sources.recording.forward_pass import ForwardPass, tensors_of
from persample.sources.recording.results import Wanted
from persample.sources.selfcheck.computed import Compute, check_once
from persample.sources.selfcheck.returned import moments_of
from persample.sources.selfcheck.rounds import QuantitiesOf
from persample.sources.selfcheck.verify_quantities import of_size


def check_outputs(
    source: Contract, forward_pass: ForwardPass, indices: Sequence[int], wanted: Wanted, method: str
) -> None:
    """Run the self-check of a backend.

    Args:
        source: the backend.
        forward_pass: the pass.
        indices: the outputs of which the loss is made.
        wanted: the quantities to check, beside the moments.
        method: by what name the self-check remembers that this was checked.
    """

    def loss_fn(outputs: Any, numbers: Tensor) -> Tensor:
        found = tensors_of(outputs)
        losses = torch.zeros(len(numbers), device=found[indices[0]].device)
        for index in indices:
            output = found[index]
            weights = _weights(output.shape[1:], index).to(output)
            finite = torch.where(output.isfinite(), output, 0)  # attention masks may be infinite
            losses = losses + (finite * weights).reshape(len(numbers), -1).sum(1)
        return losses

    batch, state = forward_pass.batch, forward_pass.state
    with forward_pass.under_autocast(), nullcontext() if state is None else state_restored(source.state()):
        if state is not None:
            state.put_back()
        computes: list[Compute] = [moments_of]
        size = batch.size if forward_pass.groups is None else len(forward_pass.groups)
        if asked := [of_size(quantity, size) for quantity in wanted.quantities]:
            computes.append(QuantitiesOf(asked, forward_pass.groups))
        check_once(source, batch.with_targets(batch.targets), loss_fn, method, computes)


def _weights(shape: torch.Size, index: int) -> Tensor:
    """Irregular numbers that are not random: `torch.func.vmap` would refuse to draw."""
    numbers = torch.arange(shape.numel(), dtype=torch.float64, device="cpu")
    return torch.sin(math.sqrt(2) * (1 + index) * (1 + numbers)).reshape(shape)
