"""How far two computations of the same number may differ before one of them is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from persample.sources.model.autograd_graph import nodes_behind

_RELATIVE = {torch.float64: 1e-7, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}

#: The part of a gradient that rounding may move elsewhere. Where the largest two pixels of a pooling window, or the two
#: sides of a ReLU, are nearly equal, rounding decides which of them gets the gradient, and a batch may be rounded
#: otherwise than its single samples. A backend that is off by more than rounding, but no more than this, is right if it
#: is right in float64, where that is as good as excluded.
MOVED = 5e-2


def largest_entry(values: Tensor) -> float:
    """Return the largest absolute entry; NaN counts as 0."""
    return largest_entries([values])[0]


def largest_entries(tensors: Iterable[Tensor]) -> list[float]:
    """Return the largest absolute entry of each; NaN counts as 0. A GPU is waited for once."""
    return read(
        [
            t.detach().abs().nan_to_num(nan=0.0).max() if t.numel() else t.new_zeros((), dtype=t.dtype.to_real())
            for t in tensors
        ]
    )


def read(numbers: Sequence[Tensor]) -> list[float]:
    """Return the numbers of tensors that have one each. A GPU is waited for once."""
    if len(numbers) < 2:
        return [number.item() for number in numbers]
    found: list[float] = torch.stack([number.to(numbers[0].device) for number in numbers]).tolist()
    return found


def tolerance(values: Tensor) -> float:
    """Return the relative difference that rounding can explain, for a computation that gave `values`."""
    return _RELATIVE[least_precise(values)]


def least_precise(values: Tensor) -> torch.dtype:
    """Return the dtype of the least precise numbers of the computation that gave `values`.

    If they have an autograd graph, all of it counts: many language models normalise in float32 whatever the dtype of
    their parameters. Under autocast the results are float32, but most products were rounded to 8 (bfloat16) or 11 bits.
    """
    if torch.is_autocast_enabled(values.device.type):
        return torch.bfloat16
    dtypes = {output.dtype for node in nodes_behind(values) for output in node._input_metadata} | {values.dtype}
    return max((real for dtype in dtypes if (real := dtype.to_real()) in _RELATIVE), key=_RELATIVE.__getitem__)


@dataclass(frozen=True)
class Allowance:
    """What rounding explains in the gradients of a batch.

    Attributes:
        relative: the relative difference.
        dtype: that of the least precise numbers of the computation.
        largest_loss: of a sample. Rounding may leave some units in its last place where gradients vanish.
        left: by the names of parameters, what rounding leaves of gradients of a sample that vanish in exact
            arithmetic, where that was found to be more.
    """

    relative: float
    dtype: torch.dtype
    largest_loss: float
    left: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, losses: Tensor, rounding: float = 0.0, left: Mapping[str, float] | None = None) -> Allowance:
        """Return what rounding explains in the gradients of `losses`: relatively at least `rounding`."""
        dtype = least_precise(losses)
        largest = losses.detach().abs().max().item() if losses.numel() else 0.0
        return cls(max(rounding, _RELATIVE[dtype]), dtype, largest, left or {})

    def difference(self, name: str, size: float, largest: float, samples: int) -> float:
        """Return how far two values may differ.

        Args:
            name: of the parameter.
            size: the largest entry of its value.
            largest: the largest entry of all parameters' values.
            samples: number of gradients that are added up in it.
        """
        floor = min(50 * torch.finfo(self.dtype).eps, 1e-4 * self.relative) * self.largest_loss
        # Ties that last bits decide are no rounding, so what is left has a limit. The loss may vanish, too.
        left = min(self.left.get(name, 0.0), self.relative * max(1.0, self.largest_loss))
        return self.relative * (size + 1e-2 * largest) + samples * (floor + left)
