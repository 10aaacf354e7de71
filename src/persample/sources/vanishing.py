"""What rounding leaves of gradients that vanish in exact arithmetic.

In front of a norm over a single number, say, everything cancels: one computation of the gradient gives 1e-13, another
one 0, and neither is wrong. Such a gradient has no size of its own to measure differences by, and that of the loss says
nothing of the numbers that cancel on the way. But it gives itself away: move the parameters in their last bits, and it
is another one. A gradient that is not made of rounding, however small, hardly changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

_MOVES = 10  # as many times the parameters are moved,
_UNITS = 8  # by as many units in the last place at most

#: A gradient vanishes if it is at most so many times as large as what it changes by.
_TIMES = 10


def rounding_left(
    model: nn.Module, gradients: Callable[[nn.Module], Mapping[str, Tensor]], dtype: torch.dtype
) -> dict[str, float]:
    """Return how large the rounding is that gradients consist of, by name; zero for those that do not vanish.

    Args:
        model: the network; copies of it are used.
        gradients: returns gradients of a model by the names of its parameters, the same every time.
        dtype: that of the least precise numbers of the computation.
    """
    found = gradients(copy.deepcopy(model))
    left = dict.fromkeys(found, 0.0)
    for seed in range(_MOVES):
        moved = gradients(_moved(model, dtype, seed))
        left = {name: max(most, _TIMES * _largest(moved[name] - found[name])) for name, most in left.items()}
    return {name: most if _largest(found[name]) <= most else 0.0 for name, most in left.items()}


def _moved(model: nn.Module, dtype: torch.dtype, seed: int) -> nn.Module:
    """Return a copy of `model` with parameters that differ in the last bits of `dtype`."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            units = torch.randint(-_UNITS, _UNITS + 1, p.shape, generator=generator).to(p)
            p.mul_(1 + units * torch.finfo(dtype).eps)
    return model


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0
