"""Mixtures of experts: rows of all samples, sorted or picked by a router."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import persample


class SortedExperts(nn.Module):
    """Tokens of all samples sorted by expert, and multiplied with the matrix of each, as transformers 5 does."""

    def __init__(self, experts: int, transposed: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(8, experts)
        self.matrices = nn.Parameter(torch.randn(experts, 8, 8) / 3)
        self.biases = nn.Parameter(torch.randn(experts, 8))
        self.transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        """Send each token to the expert with the highest score, the last token of all to none."""
        tokens = x.flatten(0, 1)
        score, expert = self.gate(tokens).softmax(-1).max(-1)
        order = expert.argsort()
        ends = torch.bincount(expert, minlength=len(self.matrices)).cumsum(0).to(torch.int32)
        matrices = self.matrices.transpose(1, 2) if self.transposed else self.matrices
        rows = F.grouped_mm(tokens[order], matrices, offs=ends) + self.biases[expert[order]]
        return (rows * score[order].unsqueeze(1))[order.argsort()].view_as(x)


def loss_fn(outputs: Tensor, targets: Any) -> Tensor:
    return outputs.flatten(1).sin().sum(1)


# PyTorch 2.13 has no grouped product of float64.
def assert_close(found: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("batch", "tokens", "experts"), [(3, 4, 3), (5, 1, 8), (2, 7, 1), (4, 4, 2)])
def test_sorted_rows(batch: int, tokens: int, experts: int, transposed: bool, per_sample_truth: Any) -> None:
    torch.manual_seed(0)
    model, x = SortedExperts(experts, transposed), torch.randn(batch, tokens, 8)
    truth = per_sample_truth(model, loss_fn, x, None).gradients
    source = persample.make_source("fused", model, loss_fn, check="never")
    assert_close(source.per_sample(x, None), truth)
    moments = source.moments(x, None)
    assert_close(dict(moments.mean), {name: g.mean(0) for name, g in truth.items()})
    assert_close(dict(moments.second_moment), {name: g.square().mean(0) for name, g in truth.items()})


def test_rows_of_no_group_count_for_nothing(per_sample_truth: Any) -> None:
    """The last rows belong to no expert, and what the product leaves there is thrown away."""

    class OfTwo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrices = nn.Parameter(torch.randn(2, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            ends = torch.tensor([1, 2]) * len(x)
            sorted_rows = x.transpose(0, 1).flatten(0, 1)
            rows = F.grouped_mm(sorted_rows, self.matrices, offs=ends.to(torch.int32))
            return rows.unflatten(0, (3, len(x)))[:2].transpose(0, 1).tanh()

    torch.manual_seed(0)
    model, x = OfTwo(), torch.randn(4, 3, 8)
    truth = per_sample_truth(model, loss_fn, x, None).gradients
    assert_close(persample.make_source("fused", model, loss_fn, check="never").per_sample(x, None), truth)


def test_batches_of_matrices_without_groups(per_sample_truth: Any) -> None:
    class Batched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrices = nn.Parameter(torch.randn(2, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.grouped_mm(x.transpose(0, 1).contiguous(), self.matrices).transpose(0, 1)

    torch.manual_seed(0)
    model, x = Batched(), torch.randn(3, 2, 8)
    truth = per_sample_truth(model, loss_fn, x, None).gradients
    assert_close(persample.make_source("fused", model, loss_fn, check="never").per_sample(x, None), truth)
