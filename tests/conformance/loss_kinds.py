"""Hypothesis strategies for losses and their targets, for outputs of a given shape (of one sample, without dim B)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

import persample

from .layers import Draw, Shape


@dataclass(frozen=True)
class Loss:
    """What the backend is given, and the same loss as plain tensor operations where that is something else."""

    targets: Any
    given: Callable[[Any, Any], Any]
    plain: Callable[[Any, Any], Tensor] | None = None
    features: frozenset[str] = frozenset()


def _per_sample(entries: Tensor) -> Tensor:
    return entries.reshape(len(entries), -1).sum(1)


def weighted_squares(outputs: Tensor, targets: dict[str, Any]) -> Tensor:
    """Nested targets, one of which weighs the samples: some not at all."""
    values, (weights,) = targets["values"], targets["weights"]
    return weights * _per_sample((outputs - values).square())


def robust(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mixes all outputs of a sample, and takes all shapes."""
    return torch.log1p((outputs.flatten(1).sin() * targets.flatten(1)).sum(1).square())


def without_targets(outputs: Tensor, targets: None) -> Tensor:
    return outputs.flatten(1).logsumexp(1)


@st.composite
def losses(draw: Draw, size: int, shape: Shape) -> Loss:
    values = torch.randn(size, *shape).double()
    weights = torch.tensor([draw(st.sampled_from([0.0, 0.5, 2.0])) for _ in range(size)]).double()
    options: list[Callable[[], Loss]] = [
        lambda: Loss(values, persample.losses.gaussian),
        lambda: Loss((values > 0).double(), persample.losses.bernoulli),
        lambda: Loss({"values": values, "weights": (weights,)}, weighted_squares),
        lambda: Loss(values, robust),
        lambda: Loss(None, without_targets),
        lambda: Loss(
            values,
            nn.MSELoss(),
            lambda outputs, targets: _per_sample((outputs - targets) ** 2),
            frozenset({"nn loss"}),
        ),
    ]
    if len(shape) >= 1:
        labels = torch.randint(shape[0], (size, *shape[1:]))
        options.append(lambda: Loss(labels, persample.losses.cross_entropy))
        class_weights = torch.rand(shape[0]).double()
        options.append(
            lambda: Loss(
                labels,
                nn.CrossEntropyLoss(class_weights, ignore_index=0, label_smoothing=0.1),
                lambda outputs, targets: _per_sample(
                    F.cross_entropy(
                        outputs, targets, class_weights, ignore_index=0, label_smoothing=0.1, reduction="none"
                    )
                ),
                frozenset({"nn loss"}),
            )
        )
    return draw(st.sampled_from(options))()
