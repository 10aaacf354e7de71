"""Moments of the gradients in forward and backward passes that the user runs: `with source.recording(): …`.

The user calls the model and reduces the losses to a scalar, L = Σ_i ℓ_i / B or Σ_i ℓ_i. A row of the backward
pass, what sample i adds to the gradient of L, is then c g_i with c = 1/B or 1, so that

    Σ_i g_i / B = Σ_i row_i / (c B)        Σ_i g_i² / B = Σ_i row_i² / (c² B)

If L was multiplied before (a gradient scaler of mixed precision, a trainer that divides by the number of batches whose
gradients it accumulates), c is so much larger or smaller.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from persample.errors import OptionError
from persample.moments import Moments, merge_moments
from persample.quantities.computed import Quantities, refuse_quantities
from persample.quantities.protocol import Quantity

LossReduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class Sums:
    """Σ_i row_i and Σ_i row_i² of one backward pass over B samples, for the parameters that it reached, by name.

    The squares are None where nobody wants them.
    """

    size: int
    total: Mapping[str, Tensor]
    squares: Mapping[str, Tensor] | None


@dataclass(frozen=True)
class Wanted:
    """The quantities that are wanted of a recording, beside the moments.

    Attributes:
        quantities: what is asked for.
        groups: for each sample of a pass the number of its group; None if each stands alone.
        loss_scale: the number by which the losses are multiplied before the backward pass; None if it is not known.
    """

    quantities: Sequence[Quantity[Any]] = ()
    groups: Tensor | Sequence[int] | None = None
    loss_scale: float | None = None

    def __post_init__(self) -> None:
        refuse_quantities(self.quantities)
        if self.groups is not None and not self.quantities:
            raise OptionError(
                "groups= says of what sums quantities are taken, and none is asked for: pass quantities=."
            )
        if self.loss_scale is not None and not 0 < self.loss_scale < math.inf:
            raise OptionError(f"loss_scale={self.loss_scale!r} must be positive and finite.")

    def factor(self, reduction: LossReduction, size: int) -> float:
        """Return 1 / c, by which a row of a backward pass over `size` samples becomes g_i."""
        return (size if reduction == "mean" else 1) / (1.0 if self.loss_scale is None else self.loss_scale)


@dataclass(eq=False)
class Recorded:
    """What a recording has seen; complete when its context has ended.

    Attributes:
        reduction: how the user reduced the losses.
        parameters: those that require a gradient, by name.
        wanted: what was asked for.
        sums: of each backward pass.
        quantities: those that were asked for, of each backward pass; their losses are not a number, because the user
            kept them.
        left: what the last backward pass left in `p.grad`, by name.
        loss_scale: by what number the user multiplied each of the scalars on purpose; None if it is not known.
    """

    reduction: LossReduction
    parameters: Mapping[str, nn.Parameter]
    wanted: Wanted = field(default_factory=Wanted)
    sums: list[Sums] = field(default_factory=list)
    quantities: list[Quantities] = field(default_factory=list)
    left: Mapping[str, Tensor] = field(default_factory=dict)
    loss_scale: float | None = None

    def weight(self, sums: Sums) -> float:
        """Return c of the samples of one backward pass, without the scale of a gradient scaler."""
        scale = 1.0 if self.loss_scale is None else self.loss_scale
        return scale / sums.size if self.reduction == "mean" else scale

    def moments(self, scale: float = 1.0) -> Moments:
        """Return the moments over all backward passes, batches by their sizes.

        Args:
            scale: the number by which the losses were multiplied beside `loss_scale`.

        Returns:
            `Moments` whose losses are not a number, because the user kept them.
        """
        parts = [self._moments(sums, scale) for sums in self.sums]
        return parts[0] if len(parts) == 1 else merge_moments(parts)

    def _moments(self, sums: Sums, scale: float) -> Moments:
        scale *= 1.0 if self.loss_scale is None else self.loss_scale
        c, of_all = (scale / sums.size, scale) if self.reduction == "mean" else (scale, scale * sums.size)

        def all_parameters(found: Mapping[str, Tensor], divisor: float) -> dict[str, Tensor]:
            values = found if divisor == 1 else {name: value / divisor for name, value in found.items()}
            return {
                name: values[name].to(p.dtype) if name in values else torch.zeros_like(p, requires_grad=False)
                for name, p in self.parameters.items()
            }

        return Moments(
            losses=unknown_losses(sums.size, self.parameters),
            mean=all_parameters(sums.total, of_all),
            second_moment={} if sums.squares is None else all_parameters(sums.squares, c * of_all),
        )


def unknown_losses(size: int, parameters: Mapping[str, Tensor]) -> Tensor:
    """Return losses that are not a number."""
    device = next(iter(parameters.values())).device if parameters else None
    return torch.full((size,), torch.nan, device=device)
