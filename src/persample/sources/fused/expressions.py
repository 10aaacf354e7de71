"""Tensors computed from parameters alone: a transpose, a slice, a low-rank product, a masked or normalised weight.

An operation on samples may use such an expression θ' = f(θ) in place of a parameter. Its gradients g'_i are then pulled
back through f sample by sample, g_i = (∂f/∂θ)ᵀ g'_i. Where f only puts entries in another order, each at most once,
squaring commutes with it, and sums can be pulled back in place of single samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Expression:
    """θ' = f(θ).

    Attributes:
        value: θ', detached.
        graph: θ' with its autograd graph back to the parameters; the parameter itself where f is the identity.
        parameters: the parameters θ that it depends on, by name.
        reorders: whether f only reorders, reshapes or leaves away entries of one parameter.
        expanded: where θ' is another expression expanded along new samples, that other one.
    """

    value: Tensor
    graph: Tensor
    parameters: Mapping[str, nn.Parameter]
    reorders: bool
    expanded: Expression | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters."""
        return tuple(self.parameters)

    @property
    def width(self) -> int:
        """How many numbers one sample's gradients take."""
        return self.value.numel() + sum(math.prod(p.shape) for p in self.parameters.values())

    @property
    def is_parameter(self) -> bool:
        """Whether f is the identity."""
        return isinstance(self.graph, nn.Parameter)

    def pull(self, gradient: Tensor) -> dict[str, Tensor]:
        """Return (∂f/∂θ)ᵀ `gradient` for each parameter; `gradient` has the shape of θ'."""
        if self.is_parameter:
            return {self.names[0]: gradient}
        return self._grad(gradient, batched=False)

    def pull_rows(self, gradients: Tensor) -> dict[str, Tensor]:
        """Return the same for several gradients at once; `gradients` and the results have a leading dimension."""
        if self.is_parameter:
            return {self.names[0]: gradients}
        return self._grad(gradients, batched=True)

    def _grad(self, gradients: Tensor, *, batched: bool) -> dict[str, Tensor]:
        found = torch.autograd.grad(
            self.graph,
            list(self.parameters.values()),
            gradients.to(self.graph.dtype),
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )
        return {name: g for name, g in zip(self.parameters, found, strict=True) if g is not None}
