"""Overlapping windows of sequences, as attention by chunks takes them: views by strides, and by `unfold`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import persample
from persample.errors import UnsupportedModelError

HEADS, WIDTH = 2, 2

Chunks = Callable[[Tensor], Tensor]


def by_strides(x: Tensor) -> Tensor:
    """Return `(rows, T, D)` as `(rows, chunks, 2 · width, D)`, chunks half of which are those of the next one."""
    x = x.view(len(x), -1, 2 * WIDTH, x.shape[2])
    size, stride = list(x.shape), list(x.stride())
    size[1], stride[1] = 2 * size[1] - 1, stride[1] // 2
    return x.as_strided(size, stride)


def by_unfold(x: Tensor) -> Tensor:
    return x.unfold(1, 2 * WIDTH, WIDTH).transpose(-1, -2)


def of_every_other_entry(x: Tensor) -> Tensor:
    """What is between them in memory is read, too."""
    half = x[:, ::2]
    return half.as_strided(half.shape, x.stride()).unsqueeze(1)


def of_the_next_row(x: Tensor) -> Tensor:
    """The last row is that of the next head or sample, and in the middle of the samples one head reads the other."""
    part = x.contiguous()[:-1]
    shifted = part.as_strided(part.shape, part.stride(), part.stride(0))
    return torch.cat([shifted, x[:1]]).unsqueeze(1)


class ByChunks(nn.Module):
    """Scores of queries and keys by chunks, of heads that are folded into the samples."""

    def __init__(self, chunks: Chunks, time_first: bool) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)
        self.chunks, self.time_first = chunks, time_first

    def heads(self, x: Tensor) -> Tensor:
        if self.time_first:
            x = x.view(*x.shape[:2], HEADS, -1).transpose(0, 1)
        else:
            x = x.view(*x.shape[:2], HEADS, -1)
        return x.transpose(1, 2).reshape(len(x) * HEADS, -1, x.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        count = len(x)
        x = x.transpose(0, 1) if self.time_first else x
        query, key = self.chunks(self.heads(self.query(x))), self.chunks(self.heads(self.key(x)))
        scores = torch.einsum("bcxd,bcyd->bcxy", query, key)
        return scores.unflatten(0, (count, HEADS)).softmax(-1)


def loss_fn(outputs: Tensor, targets: Any) -> Tensor:
    flat = outputs.flatten(1)
    return (flat * torch.linspace(-1, 1, flat.shape[1], dtype=flat.dtype)).sin().sum(1)


def problem(chunks: Chunks, time_first: bool) -> tuple[ByChunks, Tensor]:
    torch.manual_seed(0)
    return ByChunks(chunks, time_first).double(), torch.randn(3, 8, 4).double()


@pytest.mark.parametrize("time_first", [True, False])
@pytest.mark.parametrize("chunks", [by_strides, by_unfold])
def test_windows_of_one_sample(chunks: Chunks, time_first: bool) -> None:
    model, x = problem(chunks, time_first)
    parameters = dict(model.named_parameters())
    losses = [loss_fn(model(x[i : i + 1]), None).sum() for i in range(3)]
    rows = [torch.autograd.grad(loss, list(parameters.values())) for loss in losses]
    found = persample.make_source("fused", model, loss_fn, check="never").per_sample(x, None)
    for n, name in enumerate(parameters):
        torch.testing.assert_close(found[name], torch.stack([g[n] for g in rows]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunks", [of_every_other_entry, of_the_next_row])
def test_what_is_read_beside_a_tensor_is_refused(chunks: Chunks) -> None:
    model, x = problem(chunks, time_first=False)
    with pytest.raises(UnsupportedModelError):
        persample.make_source("fused", model, loss_fn, check="never").moments(x, None)
