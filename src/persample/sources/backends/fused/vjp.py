"""The contribution of an operand without a rule: the vector-Jacobian product, mapped over the samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from persample.errors import UnsupportedModelError
from persample.kernels.pieces import samples_at_once
from persample.sources.model.random_state import random_state_on, same_random_state
from persample.sources.model.refusals import VMAP_OR_VJP


def no_rule(name: str, reason: str) -> UnsupportedModelError:
    """The refusal of an operation."""
    return UnsupportedModelError(
        f"{name} uses a parameter, has no rule in backend 'fused', and cannot be mapped over single samples "
        f"({reason.splitlines()[0] if reason else 'no reason given'}): {VMAP_OR_VJP}."
    )


@dataclass(frozen=True)
class Mapped:
    """g_i = (∂ operation(θ, x_i) / ∂θ)ᵀ δ_i for one operand θ.

    Attributes:
        operation: `operation(theta, *samples)` of one sample, in the shapes that a batch of one has.
        theta: the operand, the same for all samples.
        samples: what the operation takes of the samples, each with the sample as an additional dim 0.
        delta: δ, in the same way.
        name: the operation's name, for errors.
    """

    operation: Any
    theta: Tensor
    samples: tuple[Tensor, ...]
    delta: Tensor
    name: str

    def take(self, samples: slice | Tensor) -> Mapped:
        taken = tuple(x[samples] for x in self.samples)
        return Mapped(self.operation, self.theta, taken, self.delta[samples], self.name)

    def per_sample(self) -> Tensor:
        def one(delta: Tensor, *samples: Tensor) -> Tensor:
            result, pull, *_ = torch.func.vjp(lambda theta: self.operation(theta, *samples), self.theta)
            gradient: Tensor = pull(delta.to(result.dtype))[0]
            return gradient

        try:
            with torch.enable_grad():
                gradients: Tensor = torch.func.vmap(one)(self.delta, *self.samples)
                return gradients
        except RuntimeError as error:
            return self._one_by_one(error)

    def _one_by_one(self, unmapped: RuntimeError) -> Tensor:
        """Return the same by one call for each sample, for operations that `torch.func` cannot map.

        Raises:
            UnsupportedModelError: autograd cannot differentiate them either, or they draw random numbers.
        """
        before = random_state_on(self.theta.device)
        rows = []
        for number, delta in enumerate(self.delta):
            theta = self.theta.detach().requires_grad_()
            try:
                with torch.enable_grad():
                    result = self.operation(theta, *[x[number] for x in self.samples])
                rows.append(torch.autograd.grad(result, theta, delta.to(result.dtype), materialize_grads=True)[0])
            except RuntimeError as error:
                raise no_rule(self.name, str(error)) from unmapped
        if not same_random_state(before, random_state_on(self.theta.device)):
            raise no_rule(self.name, str(unmapped)) from unmapped
        return torch.stack(rows)

    def sums(self) -> tuple[Tensor, Tensor]:
        return _sums(self, len(self.delta), self.theta)


@dataclass(frozen=True)
class MappedRows:
    """The same for rows that were selected or sorted: g_i is the sum over the rows of sample i.

    Attributes:
        mapped: of each row, as if it was a sample.
        labels: whose each row is.
        first: the first of the samples that are asked for,
        last: and the one behind the last.
    """

    mapped: Mapped
    labels: Tensor
    first: int
    last: int

    def take(self, samples: slice) -> MappedRows:
        start, stop, _ = samples.indices(self.last - self.first)
        return MappedRows(self.mapped, self.labels, self.first + start, self.first + stop)

    def per_sample(self) -> Tensor:
        theta = self.mapped.theta
        gradients = theta.new_zeros(self.last - self.first, *theta.shape)
        chosen = ((self.labels >= self.first) & (self.labels < self.last)).nonzero().squeeze(1)
        if len(chosen):
            gradients.index_add_(0, self.labels[chosen] - self.first, self.mapped.take(chosen).per_sample())
        return gradients

    def sums(self) -> tuple[Tensor, Tensor]:
        return _sums(self, self.last - self.first, self.mapped.theta)


def _sums(contribution: Mapped | MappedRows, samples: int, theta: Tensor) -> tuple[Tensor, Tensor]:
    total, squares = torch.zeros_like(theta), torch.zeros_like(theta)
    rows = samples_at_once(theta.numel(), theta.device)
    for start in range(0, samples, rows):
        g = contribution.take(slice(start, start + rows)).per_sample()
        total += g.sum(0)
        squares += g.square().sum(0)
    return total, squares
