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
        norms: ‖g_i‖₂, shape `(B,)`.
    """

    gradient: dict[str, Tensor]
    weights: Tensor
    norms: Tensor


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
        """Return the same for a batch of `size`; with weights of its own in place of a function of the user's.

        Such a function may know its batch alone (weights of its samples), and may keep count of its calls.
        """
        of_fewer = self.weights[:size] if isinstance(self.weights, Tensor) else _OfAnyNorms()
        return replace(self, weights=of_fewer)


def clipping(max_norm: float) -> Callable[[Tensor], Tensor]:
    """Return the weights min(1, C / ‖g_i‖) by which each gradient has a norm of at most C = `max_norm`.

    A gradient whose norm overflows (see `Norms`) gets the weight 0.

    Raises:
        OptionError: `max_norm` is not positive.
    """
    if not max_norm > 0:
        raise OptionError(f"max_norm={max_norm!r} must be positive.")
    return Clipping(max_norm)


@dataclass(frozen=True)
class Clipping:
    """The function that `clipping` returns; it says of itself what it is made of."""

    max_norm: float

    def __call__(self, norms: Tensor) -> Tensor:
        return (self.max_norm / norms).clamp(max=1.0)


@dataclass(frozen=True)
class _OfAnyNorms:
    """A function in place of the user's; as the one of `clipping`, it says of itself what it is made of."""

    def __call__(self, norms: Tensor) -> Tensor:
        return 1 / (1 + norms)


class _WeightedSum(Accumulation[Weighted]):
    """Takes the norms in the first round; and the sum in the same round if the weights are given, else in a second."""

    reads = ("squared_norms",)

    def __init__(self, weights: Tensor | Callable[[Tensor], Tensor], setting: Setting) -> None:
        self._size, self._parameters, self._totals = setting.size, setting.parameters, Totals(setting)
        self._norms: Accumulation[Any] = Norms().begin(setting)
        self._function = weights if callable(weights) else None
        self._weights = None if callable(weights) else self._checked(weights)
        self._is_first_round, self.rereads = True, self._function is not None

    def add(self, block: Block) -> None:
        if self._weights is not None:
            self._totals.add(block.name, block.weighted_sum(self._weights[block.samples]))
        if self._is_first_round:
            self._norms.add(block)

    def another_round(self) -> bool:
        if self._function is None or not self._is_first_round:
            return False
        self._is_first_round = self.rereads = False
        self._weights = self._checked(self._function(self._norms.result()))
        return True

    def result(self) -> Weighted:
        assert self._weights is not None  # a round has given them
        return Weighted(self._totals.result(self._totals.take), self._weights, self._norms.result())

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
