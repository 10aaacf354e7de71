"""Mixtures of experts: rows of all samples, sorted or picked by a router."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import persample

pytestmark = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this PyTorch has no grouped_mm")


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


class PickedExperts(nn.Module):
    """Each expert's rows are picked, and its results added to those of the others, as transformers 4 does."""

    def __init__(self, experts: int, way: str) -> None:
        super().__init__()
        self.gate, self.out, self.way = nn.Linear(8, experts), nn.Linear(8, 3), way
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = self.gate(tokens).softmax(1).topk(min(2, len(self.experts)))
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            row, column = torch.where(chosen == number)
            if len(row) == 0:
                continue
            result = expert(tokens[row]) * weights[row, column, None]
            if self.way == "index_add_":
                out.index_add_(0, row, result)
            elif self.way == "index_add":
                out = out.index_add(dim=0, index=row, source=result, alpha=1)
            elif self.way == "scatter_add":
                out = out.scatter_add(0, row.unsqueeze(1).expand_as(result), result)
            elif self.way == "columns":
                out = out.t().index_add(1, row, result.t()).t()
            else:
                out[row] += result
        return self.out(out.view(x.shape).mean(1))


class Operations(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


WAYS = ["index_add_", "index_add", "columns", "scatter_add", "brackets"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("batch", "tokens", "experts"), [(3, 4, 3), (5, 1, 8), (1, 7, 4), (4, 4, 1)])
def test_picked_rows(batch: int, tokens: int, experts: int, way: str, per_sample_truth: Any) -> None:
    torch.manual_seed(0)
    model, x = PickedExperts(experts, way).double(), torch.randn(batch, tokens, 8, dtype=torch.float64)
    truth = per_sample_truth(model, loss_fn, x, None).gradients
    assert_close(persample.make_source("fused", model, loss_fn, check="never").per_sample(x, None), truth)


@pytest.mark.parametrize("way", WAYS[:3])
def test_experts_cost_few_operations(way: str) -> None:
    torch.manual_seed(0)
    model, x = PickedExperts(16, way), torch.randn(16, 20, 8)
    source = persample.make_source("fused", model, loss_fn, check="never", deterministic=True)
    source.moments(x, None)
    with Operations() as plain:
        loss_fn(model(x), None).sum().backward()
    model.zero_grad()
    with Operations() as fused:
        source.moments(x, None)
    assert fused.count < 4 * plain.count


def test_rows_that_meet_in_a_sum_are_refused() -> None:
    class Meeting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            picked = x[torch.tensor([1, 0, 2, 2])]
            return self.out(x.index_add(0, torch.tensor([1, 0, 1, 2]), picked))

    with pytest.raises(persample.PersampleError, match="mixes the samples"):
        persample.make_source("fused", Meeting(), loss_fn, check="never").per_sample(torch.randn(3, 8), None)
