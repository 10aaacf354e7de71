"""Inputs that all samples share, whose samples are in another dimension, or that are lists of samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from persample.sources.splits.wrappers import batched, one_per_sample, shared
from persample.testing.zoo.case import Case, Net

CASES = (
    Case(
        "Mask that all samples share",
        lambda: Net(_attend, inner=nn.MultiheadAttention(4, 2, batch_first=True)),
        lambda size: (torch.randn(size, 3, 4), shared(torch.ones(3, 3, dtype=torch.bool).triu(1))),
    ),
    Case(
        "Adjacency that all samples share",
        lambda: Net(lambda m, x, edges: edges @ m.inner(x), inner=nn.Linear(4, 3)),
        lambda size: {"x": torch.randn(size, 3, 4), "edges": shared(torch.rand(3, 3))},
    ),
    Case(
        "Positions that all samples share",
        lambda: Net(lambda m, x, places: m.inner(x + m.table(places)), table=nn.Embedding(3, 4), inner=nn.Linear(4, 2)),
        lambda size: (torch.randn(size, 3, 4), shared(torch.arange(3)[None])),
    ),
    Case(
        "Samples in dim 1, brought to dim 0",
        lambda: Net(lambda m, x, y: m.inner(x + y.transpose(0, 1)), inner=nn.Linear(4, 3)),
        lambda size: (torch.randn(size, 3, 4), batched(torch.randn(3, size, 4), dim=1)),
    ),
    Case(
        "First states, with the layers in dim 0",
        lambda: Net(_from_states, inner=nn.LSTM(4, 3, 2, batch_first=True)),
        lambda size: (
            torch.randn(size, 3, 4),
            batched((torch.randn(2, size, 3), torch.randn(2, size, 3)), dim=1),
        ),
    ),
    Case(
        "List of sets of different sizes",
        lambda: Net(_means, inner=nn.Linear(4, 3)),
        lambda size: (one_per_sample([torch.randn(1 + i % 3, 4) for i in range(size)]),),
    ),
    Case(
        "List of images, stacked in the model",
        lambda: Net(lambda m, images: m.inner(torch.stack(images)), inner=nn.Conv2d(2, 3, 2)),
        lambda size: (one_per_sample([torch.randn(2, 4, 4) for _ in range(size)]),),
    ),
)


def _attend(model: Any, x: Tensor, mask: Tensor) -> Any:
    return model.inner(x, x, x, attn_mask=mask, need_weights=False)[0]


def _from_states(model: Any, x: Tensor, states: tuple[Tensor, Tensor]) -> Any:
    return model.inner(x, states)[0]


def _means(model: Any, sets: Sequence[Tensor]) -> Tensor:
    return torch.stack([model.inner(entries).tanh().mean(0) for entries in sets])
