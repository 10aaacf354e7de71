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
from persample.testing.drawn.layers import Draw, Shape
from persample.testing.zoo.case import robust


@dataclass(frozen=True)
class Loss:
    """What the backend is given, and the same loss as plain tensor operations where that is something else."""

    targets: Any
    given: Callable[[Any, Any], Any]
    plain: Callable[[Any, Any], Tensor] | None = None


def _per_sample(entries: Tensor) -> Tensor:
    return entries.reshape(len(entries), -1).sum(1)


def _weighted_squares(outputs: Tensor, targets: dict[str, Any]) -> Tensor:
    """Nested targets, one of which weighs the samples: some not at all."""
    values, (weights,) = targets["values"], targets["weights"]
    weighted: Tensor = weights * _per_sample((outputs - values).square())
    return weighted


def _without_targets(outputs: Tensor, targets: None) -> Tensor:
    return outputs.flatten(1).logsumexp(1)


@st.composite
def losses(draw: Draw, size: int, shape: Shape) -> Loss:
    """A loss and its targets, for a batch of `size` outputs of the given shape."""
    values = torch.randn(size, *shape).double()
    weights = torch.tensor([draw(st.sampled_from([0.0, 0.5, 2.0])) for _ in range(size)]).double()
    options: list[Callable[[], Loss]] = [
        lambda: Loss(values, persample.losses.gaussian),
        lambda: Loss((values > 0).double(), persample.losses.bernoulli),
        lambda: Loss({"values": values, "weights": (weights,)}, _weighted_squares),
        lambda: Loss(values, robust),
        lambda: Loss(None, _without_targets),
        lambda: Loss(
            values,
            nn.MSELoss(),
            lambda outputs, targets: _per_sample((outputs - targets) ** 2),
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
            )
        )
    return draw(st.sampled_from(options))()
