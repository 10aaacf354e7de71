"""Operations without a rule of their own: their vector-Jacobian product, mapped over the samples by `torch.func`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from persample.errors import UnsupportedModelError
from persample.sources.fused.arguments import substitute, tensors_in
from persample.sources.fused.expressions import Expression

if TYPE_CHECKING:
    from persample.sources.fused.capture import Capture


@dataclass(frozen=True)
class Mapped:
    """g_i = (∂ operation(θ, x_i) / ∂θ)ᵀ δ_i for one operand θ.

    Attributes:
        operation: `operation(theta, *samples)` of one sample with a leading dimension of size 1.
        theta: the operand.
        samples: what the operation takes of the batch, dim 0 is the sample.
        delta: δ, dim 0 is the sample.
        name: the operation's name, for errors.
    """

    operation: Any
    theta: Tensor
    samples: tuple[Tensor, ...]
    delta: Tensor
    name: str

    def rows(self, rows: slice) -> Mapped:
        samples = tuple(x[rows] for x in self.samples)
        return Mapped(self.operation, self.theta, samples, self.delta[rows], self.name)

    def per_sample(self) -> Tensor:
        def one(delta: Tensor, *samples: Tensor) -> Tensor:
            parts = [x.unsqueeze(0) for x in samples]
            result, pull, *_ = torch.func.vjp(lambda theta: self.operation(theta, *parts), self.theta)
            gradient: Tensor = pull(delta.unsqueeze(0).to(result.dtype))[0]
            return gradient

        try:
            with torch.enable_grad():
                gradients: Tensor = torch.func.vmap(one)(self.delta, *self.samples)
                return gradients
        except RuntimeError as error:
            raise no_rule(self.name, str(error)) from error

    def sums(self) -> tuple[Tensor, Tensor]:
        g = self.per_sample()
        return g.sum(0), g.square().sum(0)

    def printed_second_moment_sum(self) -> Tensor:
        raise no_rule(self.name, "the printed formula is defined for layers only")


def no_rule(name: str, reason: str) -> UnsupportedModelError:
    """The refusal of an operation."""
    return UnsupportedModelError(
        f"{name} uses a parameter, backend 'fused' has no rule for it, and it cannot be mapped over single samples "
        f"({reason.splitlines()[0] if reason else 'no reason given'}). Use backend 'vmap' or 'loop'."
    )


def fallback(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run `func`, which has no rule, and tap its result."""
    name = getattr(func, "__name__", str(func))
    if (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__iadd__", "__imul__"):
        raise no_rule(name, "it changes a tensor in place; use the operation that returns a new one")
    operands: dict[int, Expression] = {}
    samples: list[Tensor] = []

    for leaf in {id(t): t for t in tensors_in((args, kwargs))}.values():
        expression = capture.expression(leaf)
        if expression is not None:
            operands[id(leaf)] = expression
        elif leaf in capture.layouts:
            if capture.layout(leaf, name).dim(leaf.shape) != (0, 1, 1):
                raise no_rule(name, "the samples are not in dim 0")
            samples.append(leaf)
    sample_ids = [id(x) for x in samples]
    values = substitute((args, kwargs), {key: e.value for key, e in operands.items()})
    result = func(*values[0], **values[1])
    if not isinstance(result, Tensor) or result.dim() == 0 or len(result) != capture.batch_size:
        raise no_rule(name, "its result is not a tensor whose dim 0 is the sample")
    if not result.requires_grad and not result.is_floating_point():
        return result
    taps = []
    for own, expression in operands.items():
        source = expression.expanded if expression.expanded is not None else expression

        def operation(theta: Tensor, *parts: Tensor, own: int = own, expanded: Any = expression.expanded) -> Any:
            given = {key: e.expanded.value if e.expanded is not None else e.value for key, e in operands.items()}
            given[own] = theta
            given |= dict(zip(sample_ids, parts, strict=True))
            replaced = substitute((args, kwargs), given)
            return func(*replaced[0], **replaced[1])

        def contribution(
            delta: Tensor, *saved: Tensor, operation: Any = operation, theta: Tensor = source.value
        ) -> Mapped:
            return Mapped(operation, theta, saved, delta, name)

        taps.append((source, contribution))
    return capture.tap(result.clone(), capture.batch_first(result), taps, tuple(samples))
