"""Batches that are put together: the same samples in the same order, or the batches as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import persample
from persample.loaders import put_together


def pairs(*sizes: int, columns: int = 3) -> list[tuple[Tensor, Tensor]]:
    numbers = torch.arange(sum(sizes))
    return [(rows[:, None].expand(-1, columns).float(), rows) for rows in numbers.split(list(sizes))]


@pytest.mark.parametrize(
    ("sizes", "samples", "due"),
    [
        ((4, 4, 4, 4), 8, [8, 8]),
        ((4, 4, 4, 3), 100, [15]),
        ((4, 4, 1), 7, [4, 4, 1]),
        ((20, 4, 4), 8, [20, 8]),
        ((3, 3, 3), 8, [6, 3]),
        ((), 8, []),
    ],
)
def test_all_samples_in_order(sizes: tuple[int, ...], samples: int, due: list[int]) -> None:
    found = list(put_together(pairs(*sizes), samples=samples))
    assert [len(targets) for _, targets in found] == due
    for inputs, targets in found:
        assert torch.equal(inputs[:, 0], targets.float())
    assert [t for _, targets in found for t in targets.tolist()] == list(range(sum(sizes)))


def test_no_more_bytes_than_allowed() -> None:
    each = 3 * 4 + 8
    assert [len(t) for _, t in put_together(pairs(4, 4, 4), max_bytes=8 * each)] == [8, 4]
    assert [len(t) for _, t in put_together(pairs(4, 4, 4), max_bytes=each)] == [4, 4, 4]


def test_dicts_and_tuples() -> None:
    batches = [({"ids": x, "others": (x, 2 * x)}, {"labels": y}) for x, y in pairs(2, 2)]
    ((inputs, targets),) = put_together(batches)
    assert inputs["others"][1].shape == (4, 3)
    assert targets["labels"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "other",
    [
        (torch.zeros(2, 5), torch.zeros(2)),  # another length
        (torch.zeros(2, 3).double(), torch.zeros(2).long()),  # another dtype
        ((torch.zeros(2, 3), torch.zeros(1, 3)), torch.zeros(2).long()),  # not of samples
        ((torch.zeros(2, 3), "name"), torch.zeros(2).long()),
        (persample.shared(torch.zeros(2, 3)), torch.zeros(2).long()),
        (torch.zeros(2, 3).to_sparse(), torch.zeros(2).long()),
    ],
)
def test_what_is_of_another_kind_stays_as_it_is(other: Any) -> None:
    first = pairs(2)[0]
    found = list(put_together([first, other, other, first]))
    assert found[0] is first
    assert found[-1] is first
    if len(found) == 4:
        assert found[1] is other


def test_the_fisher_information_is_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(30, 3, dtype=torch.float64), torch.randint(2, (30,))
    for kind in ("empirical", "exact"):
        found, whole = (
            persample.fisher(
                model, list(zip(x.split(size), y.split(size), strict=True)), loss_fn=nn.CrossEntropyLoss(), kind=kind
            )
            for size in (4, 30)
        )
        assert found.data_size == 30
        for name, value in found.diagonal.items():
            torch.testing.assert_close(value, whole.diagonal[name])
