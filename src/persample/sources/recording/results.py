"""Moments of the gradients in forward and backward passes that the user runs: `with source.recording(): …`.

The user calls the model and reduces the losses to a scalar himself, L = Σ_i ℓ_i / B or Σ_i ℓ_i. A row of the backward
pass, what sample i adds to the gradient of L, is then c g_i with c = 1/B or 1, so that

    Σ_i g_i / B = Σ_i row_i / (c B)        Σ_i g_i² / B = Σ_i row_i² / (c² B)

If L was multiplied before (a gradient scaler of mixed precision, a trainer that divides by the number of batches whose
gradients it accumulates), c is so much larger or smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from persample.moments import Moments, merge_moments

LossReduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class Sums:
    """Σ_i row_i and Σ_i row_i² of one backward pass over B samples, for the parameters that it reached, by name.

    The squares are None where nobody wants them.
    """

    size: int
    total: Mapping[str, Tensor]
    squares: Mapping[str, Tensor] | None


@dataclass(eq=False)
class Recorded:
    """What a recording has seen; complete when its context has ended.

    Attributes:
        reduction: how the user reduced the losses.
        parameters: those that require a gradient, by name.
        sums: of each backward pass.
        left: what the last backward pass left in `p.grad`, by name.
        loss_scale: by what number the user multiplied each of the scalars on purpose; None if it is not known.
    """

    reduction: LossReduction
    parameters: Mapping[str, nn.Parameter]
    sums: list[Sums] = field(default_factory=list)
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
        device = next(iter(self.parameters.values())).device if self.parameters else None

        def all_parameters(found: Mapping[str, Tensor], divisor: float) -> dict[str, Tensor]:
            values = found if divisor == 1 else {name: value / divisor for name, value in found.items()}
            return {
                name: values[name].to(p.dtype) if name in values else torch.zeros_like(p, requires_grad=False)
                for name, p in self.parameters.items()
            }

        return Moments(
            losses=torch.full((sums.size,), torch.nan, device=device),
            mean=all_parameters(sums.total, of_all),
            second_moment={} if sums.squares is None else all_parameters(sums.squares, c * of_all),
        )
