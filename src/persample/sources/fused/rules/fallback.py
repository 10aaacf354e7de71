"""Operations without a rule of their own: their vector-Jacobian product, mapped over the samples by `torch.func`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from persample.errors import UnsupportedModelError
from persample.sources.contributions import Contribution
from persample.sources.fused.arguments import substitute, tensors_in
from persample.sources.fused.expressions import Expression
from persample.sources.fused.own_rows import OwnRows
from persample.sources.fused.places import Place, place_of, place_of_rows
from persample.sources.fused.trial import place_by_trial

if TYPE_CHECKING:
    from persample.sources.fused.capture import Capture


@dataclass(frozen=True)
class Mapped:
    """g_i = (∂ operation(θ, x_i) / ∂θ)ᵀ δ_i for one operand θ.

    Attributes:
        operation: `operation(theta, *samples)` of one sample, in the shapes that a batch of one has.
        theta: the operand, the same for all samples; or, with the sample as an additional dim 0, its part for each.
        shared: whether it is the same for all samples.
        samples: what else the operation takes of the samples, each with the sample as an additional dim 0.
        delta: δ, in the same way.
        name: the operation's name, for errors.
    """

    operation: Any
    theta: Tensor
    shared: bool
    samples: tuple[Tensor, ...]
    delta: Tensor
    name: str

    def rows(self, rows: slice) -> Mapped:
        theta = self.theta if self.shared else self.theta[rows]
        samples = tuple(x[rows] for x in self.samples)
        return Mapped(self.operation, theta, self.shared, samples, self.delta[rows], self.name)

    def per_sample(self) -> Tensor:
        def one(theta: Tensor, delta: Tensor, *samples: Tensor) -> Tensor:
            result, pull, *_ = torch.func.vjp(lambda theta: self.operation(theta, *samples), theta)
            gradient: Tensor = pull(delta.to(result.dtype))[0]
            return gradient

        dims = (None if self.shared else 0, 0, *(0 for _ in self.samples))
        try:
            with torch.enable_grad():
                gradients: Tensor = torch.func.vmap(one, in_dims=dims)(self.theta, self.delta, *self.samples)
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


@dataclass(frozen=True)
class _Operand:
    """How an operand computed from parameters is seen by a single sample.

    Attributes:
        source: the expression whose contribution is asked for.
        place: where it has an entry for each sample; None if it is the same for all of them.
    """

    source: Expression
    place: Place | None = None

    def for_samples(self, batch: int) -> Tensor:
        """Return it as it is, or with the sample as an additional dim 0."""
        return self.place.sample_first(self.source.value, batch) if self.place else self.source.value

    def of_last_sample(self, batch: int) -> Tensor:
        """Return it as the last sample sees it."""
        return self.for_samples(batch)[-1] if self.place else self.source.value


def fallback(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run `func`, which has no rule, and tap its result."""
    name = getattr(func, "__name__", str(func))
    if (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__iadd__", "__imul__"):
        raise no_rule(name, "it changes a tensor in place; use the operation that returns a new one")
    batch = capture.batch_size
    expressions: dict[int, Expression] = {}
    samples: dict[int, Tensor] = {}
    places: dict[int, Place] = {}
    for leaf in tensors_in((args, kwargs)):
        expression = capture.expression(leaf)
        if expression is not None:
            expressions[id(leaf)] = expression
        elif leaf in capture.layouts or (not capture.forward_pass and leaf.shape[:1] == (batch,)):
            place = place_of(capture.layout(leaf, name), leaf.shape)
            if place is None:
                raise no_rule(name, "the samples are not in one dimension")
            samples[id(leaf)], places[id(leaf)] = leaf, place

    def run(given: Mapping[int, Tensor]) -> Any:
        replaced = substitute((args, kwargs), given)
        return func(*replaced[0], **replaced[1])

    result = run({key: e.value for key, e in expressions.items()})
    if not isinstance(result, Tensor) or result.dim() == 0:
        raise no_rule(name, "its result is not a tensor that holds the samples")
    if not result.requires_grad and not result.is_floating_point():
        return result
    last = {key: places[key].sample_first(x.detach(), batch)[-1] for key, x in samples.items()}
    for operands in _ways(expressions, list(places.values()), batch):
        given = last | {key: operand.of_last_sample(batch) for key, operand in operands.items()}
        at = place_by_trial(result, partial(run, given), batch)
        if at is not None:
            break
    else:
        raise no_rule(name, "its result for a sample alone is not that sample's part of its result for the batch")
    return capture.tap(
        result.clone(),
        at.layout(result.shape, batch),
        [_contribution_of(key, operands, run, places, at, batch, name) for key in operands],
        tuple(samples.values()),
    )


def _ways(expressions: Mapping[int, Expression], places: list[Place], batch: int) -> Iterator[dict[int, _Operand]]:
    """Yield the ways in which a single sample may see the operands: the first that gives the right result is taken."""
    yield {key: _Operand(e) for key, e in expressions.items()}
    # As they were before they were expanded along the samples; with entries of their own for the samples.
    yield {key: _Operand(e.expanded or e) for key, e in expressions.items()}
    yield {key: _Operand(e, place_of_rows(e.value.shape, batch, places)) for key, e in expressions.items()}


def _contribution_of(
    key: int,
    operands: Mapping[int, _Operand],
    run: Callable[[Mapping[int, Tensor]], Any],
    places: Mapping[int, Place],
    at: Place,
    batch: int,
    name: str,
) -> tuple[Expression, Callable[..., Contribution]]:
    """Return an operand and what makes its contribution, for a tap."""
    own = operands[key]
    shared = {k: o.source.value for k, o in operands.items() if k != key and o.place is None}
    rows = {k: o for k, o in operands.items() if k != key and o.place is not None}

    def operation(theta: Tensor, *parts: Tensor) -> Any:
        return run(shared | {key: theta} | dict(zip((*rows, *places), parts, strict=True)))

    def contribution(delta: Tensor, *saved: Tensor) -> Contribution:
        parts = (
            *(operand.for_samples(batch) for operand in rows.values()),
            *(place.sample_first(x, batch) for place, x in zip(places.values(), saved, strict=True)),
        )
        mapped = Mapped(
            operation, own.for_samples(batch), own.place is None, parts, at.sample_first(delta, batch), name
        )
        return mapped if own.place is None else OwnRows(mapped.per_sample(), own.place, batch)

    return own.source, contribution
