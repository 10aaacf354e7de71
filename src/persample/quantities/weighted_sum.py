"""A sum of the gradients with a weight for each sample, which may be made of the norms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from persample.errors import OptionError
from persample.quantities.block import Block
from persample.quantities.norms import Norms
from persample.quantities.protocol import Accumulation, Setting
from persample.quantities.totals import Totals


@dataclass(frozen=True)
class Weighted:
    """What `WeightedSum` gives.

    Attributes:
        gradient: Σ_i w_i g_i for each parameter, by its name, in its dtype.
        weights: w, shape `(B,)`.
        norms: ‖g_i‖₂, shape `(B,)`; None where the weights were given.
    """

    gradient: dict[str, Tensor]
    weights: Tensor
    norms: Tensor | None


@dataclass(frozen=True)
class WeightedSumResult(Weighted):
    """What `source.weighted_sum` returns: the losses, too.

    Attributes:
        losses: the B losses, detached, shape `(B,)`.
    """

    losses: Tensor


@dataclass(frozen=True)
class WeightedSum:
    """Σ_i w_i g_i.

    Attributes:
        weights: a tensor of shape `(B,)`, or a function that makes one of the norms `(B,)`, such as
            `clipping(1.0)`.

    Raises:
        OptionError: the weights have another shape, or are not real numbers.
    """

    weights: Tensor | Callable[[Tensor], Tensor]
    name: str = "weighted_sum"

    def begin(self, setting: Setting) -> Accumulation[Weighted]:
        return _WeightedSum(self.weights, setting)

    def of_size(self, size: int) -> WeightedSum:
        """Return the same for a batch of `size`."""
        return replace(self, weights=self.weights[:size]) if isinstance(self.weights, Tensor) else self


def clipping(max_norm: float) -> Callable[[Tensor], Tensor]:
    """Return the weights min(1, C / ‖g_i‖) by which each gradient has a norm of at most C = `max_norm`.

    Raises:
        OptionError: `max_norm` is not positive.
    """
    if not max_norm > 0:
        raise OptionError(f"max_norm={max_norm!r} must be positive.")
    return lambda norms: (max_norm / norms).clamp(max=1.0)


class _WeightedSum(Accumulation[Weighted]):
    def __init__(self, weights: Tensor | Callable[[Tensor], Tensor], setting: Setting) -> None:
        self._size, self._parameters, self._totals = setting.size, setting.parameters, Totals(setting)
        self._norms: Tensor | None = None
        self._first: Accumulation[Any] | None = None
        if isinstance(weights, Tensor):
            self._weights = self._checked(weights)
        else:
            self._function, self._first, self.rereads = weights, Norms().begin(setting), True

    def add(self, block: Block) -> None:
        if self._first is not None:
            self._first.add(block)
        else:
            self._totals.add(block.name, block.weighted_sum(self._weights[block.samples]))

    def another_round(self) -> bool:
        if self._first is None:
            return False
        norms: Tensor = self._first.result()
        self._norms, self._first = norms, None
        self._weights = self._checked(self._function(norms))
        return True

    def result(self) -> Weighted:
        return Weighted(self._totals.divided(), self._weights, self._norms)

    def _checked(self, weights: Any) -> Tensor:
        if not isinstance(weights, Tensor) or weights.shape != (self._size,) or weights.is_complex():
            found = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise OptionError(
                f"weights must be {self._size} real numbers, a tensor of shape ({self._size},), one for each gradient; "
                f"got {found}."
            )
        weights = weights.detach()
        device = next(iter(self._parameters.values()), weights).device
        dtype = weights.dtype if weights.is_floating_point() else torch.get_default_dtype()
        checked: Tensor = weights.to(device, dtype)
        return checked
