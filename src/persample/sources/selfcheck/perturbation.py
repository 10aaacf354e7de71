"""How large rounding makes gradients that are zero in exact arithmetic.

In front of a norm over a single number, say, everything cancels: one computation of the gradient gives 1e-13, another
one 0, and neither is wrong. Such a gradient has no size of its own to measure differences by, and that of the loss says
nothing of the numbers that cancel on the way. But it gives itself away: move parameters and inputs in their last bits,
and it is another one. A gradient that is not made of rounding, however small, hardly changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from persample.sources.model.detached_inputs import entering
from persample.sources.splits.tree import map_tensors

_MOVES = 10  # as many times all numbers are moved,
_UNITS = 8  # by as many units in the last place at most

#: A gradient vanishes if it is at most so many times as large as what it changes by.
_TIMES = 10


def rounding_left(
    model: nn.Module, inputs: Any, gradients: Callable[[nn.Module, Any], Mapping[str, Tensor]], dtype: torch.dtype
) -> dict[str, float]:
    """Return the size of gradients that consist of rounding only, by name; zero for all others.

    Args:
        model: the network; copies of it are used.
        inputs: tensors in tuples, lists and dicts.
        gradients: returns gradients of a model for inputs like these by the names of its parameters, the same every
            time.
        dtype: that of the least precise numbers of the computation.
    """
    found = gradients(copy.deepcopy(model), inputs)
    left = dict.fromkeys(found, 0.0)
    for seed in range(_MOVES):
        generator = torch.Generator().manual_seed(seed)
        twin = copy.deepcopy(model)
        for p in twin.parameters():
            p.data = _moved(p.data, dtype, generator)
        move = partial(_moved_input, dtype=dtype, generator=generator)
        moved = gradients(twin, map_tensors(entering(move), inputs))
        left = {name: max(most, _TIMES * _largest(moved[name] - found[name])) for name, most in left.items()}
    return {name: most if _largest(found[name]) <= most else 0.0 for name, most in left.items()}


def _moved(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return `values` with their last bits in `dtype` changed."""
    units = torch.randint(-_UNITS, _UNITS + 1, values.shape, device=generator.device, generator=generator).to(values)
    return values * (1 + units * torch.finfo(dtype).eps)


def _moved_input(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """The same for real numbers; integers, which may be masks or indices, stay."""
    if not values.is_floating_point():
        return values
    return torch.where(values == values.round(), values, _moved(values, dtype, generator))


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0
