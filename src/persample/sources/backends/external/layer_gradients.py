"""`LayerGradients`: the gradients by one parameter, as another package's rules give them for the calls of its layers.

One forward and one backward pass have given the input a and the gradient δ of each call. What is made of them is the
package's: its own norms and sums where these are right, else what follows from the gradients that it forms.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from persample.dtypes import at_least_float32
from persample.kernels.linear import have_cancelled
from persample.quantities.block import Block


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer that the losses depend on.

    Attributes:
        name: how errors name the layer.
        layer: the module; it owns trainable parameters.
        inputs: the tensors that it was given, detached; dim 0 is the sample.
        delta: δ, the gradient of Σ_i loss_i at its output.
    """

    name: str
    layer: nn.Module
    inputs: tuple[Tensor, ...]
    delta: Tensor

    def take(self, samples: slice | Tensor) -> LayerCall:
        """Return the call with some of the samples."""
        return replace(self, inputs=tuple([a[samples] for a in self.inputs]), delta=self.delta[samples])

    def of_one(self, parameter: nn.Parameter) -> LayerCall:
        """Return the call of a layer of which `parameter` alone is trainable, so that rules do nothing for others."""
        if all(p is parameter for p in trainable(self.layer)):
            return self
        layer = copy.copy(self.layer)
        layer._parameters = {
            name: p if p is parameter or p is None else nn.Parameter(p.detach(), requires_grad=False)
            for name, p in self.layer._parameters.items()
        }
        return replace(self, layer=layer)


class LayerRules(Protocol):
    """What a package makes of the calls of layers of which one parameter is trainable.

    Where its rules form gradients, they are to do so for `rows` samples at once.
    """

    def gradients(self, use: LayerCall) -> Tensor:
        """Return g_i, `(b, *parameter.shape)`."""

    def own_squared_norms(self, name: str, uses: Sequence[LayerCall], rows: int) -> Tensor | None:
        """Return ‖g_i‖² of a parameter as the package's own rule gives them; None where that is not right."""

    def own_squares(self, uses: Sequence[LayerCall], rows: int) -> Tensor | None:
        """Return Σ_i g_i² by the package's own rule; None where it has none, or not for these calls."""

    def own_weighted_sum(self, use: LayerCall, weights: Tensor) -> Tensor | None:
        """Return Σ_i w_i g_i by the package's own rule; None where it has none."""


@dataclass(frozen=True)
class LayerGradients(Block):
    """The gradients of a parameter by the calls of its layers.

    All calls are added up for each sample before anything is made of it, so that the cross terms are there.

    Attributes:
        uses: the calls.
        rules: those of the package.
        rows: of how many samples gradients are formed at once.
        most: of how many they may be at once.
    """

    uses: Sequence[LayerCall]
    rules: LayerRules
    rows: int
    most: int

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.size, self.rows):
            where = slice(start, min(self.size, start + self.rows))
            found = [at_least_float32(self.rules.gradients(use.take(where))) for use in self.uses]
            yield where, reduce(torch.add, found)

    def gram(self) -> Tensor:
        # Each piece meets all others, which are formed anew for it: the fewer pieces, the better.
        if self.rows >= min(self.most, self.size):
            return super().gram()
        rows = self.most if self.most >= self.size else max(1, self.most // 2)
        return replace(self, rows=rows).gram()

    def compute_squared_norms(self) -> Tensor:
        found = self.rules.own_squared_norms(self.name, self.uses, self.rows)
        return super().compute_squared_norms() if found is None else found

    def compute_sums(self) -> tuple[Tensor, Tensor]:
        squares = self.rules.own_squares(self.uses, self.rows)
        if squares is None:
            return super().compute_sums()
        return self.weighted_sum(squares.new_ones(self.size)), squares

    def weighted_sum(self, weights: Tensor) -> Tensor:
        total: Tensor | None = None
        for use in self.uses:
            found = self.rules.own_weighted_sum(use, weights)
            if found is None:
                return super().weighted_sum(weights)
            total = found if total is None else total + found
        assert total is not None  # a block has uses
        return total


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of `module` itself that require a gradient."""
    return [p for p in module._parameters.values() if p is not None and p.requires_grad]


def positions(use: LayerCall) -> int:
    """Return at how many positions of a sample the weight of a linear layer or convolution was used; 0 for others."""
    (parameter,) = trainable(use.layer)
    if not isinstance(use.layer, nn.Linear | _ConvNd) or parameter is not use.layer.weight:
        return 0
    return math.prod(use.delta.shape[1:-1] if isinstance(use.layer, nn.Linear) else use.delta.shape[2:])


def cancels(use: LayerCall, squared_norms: Tensor) -> bool:
    """Whether ‖g_i‖² are too small for their digits to be right, where they may be sums over pairs of positions.

    Such sums have the rounding errors of their terms, Σ_ll' (δ_l·δ_l')(a_l·a_l'). These are of the size of
    ‖δ_i‖² ‖a_i‖² / L where the positions do not depend on each other, as is ‖g_i‖².
    """
    if positions(use) < 2:
        return False
    terms = _squares(use.delta) * _squares(use.inputs[0]) / positions(use)
    return bool(have_cancelled(squared_norms, terms).any())


def _squares(values: Tensor) -> Tensor:
    return values.flatten(1).square().sum(1)
