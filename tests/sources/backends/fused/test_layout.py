"""Where the samples are in a tensor: three numbers or owners, against labels written down entry by entry."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from persample.sources.backends.fused.axis import Axis
from persample.sources.backends.fused.layout import Layout, layout_of, of_rows, rows_in, without_gaps
from persample.sources.backends.fused.owners import NOBODY

BATCH = 5


def labelled(shape: tuple[int, ...], dim: int, labels: Tensor | None = None) -> tuple[Tensor, Layout, Tensor]:
    """A tensor with the samples along `dim`, where they are, and whose each of its entries is."""
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)
    owners = torch.arange(shape[dim]) if labels is None else labels
    written_down = owners.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)
    return x, layout_of(x, dim, labels, BATCH), written_down


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_the_samples_are_along_a_dimension(dim: int) -> None:
    shape = [2, 3, 4]
    shape[dim] = BATCH
    x, layout, owners = labelled(tuple(shape), dim)
    assert layout.axis(x.shape) == Axis(dim)
    assert torch.equal(layout.labels(x.shape, x.device), owners)
    assert layout.at(Axis(dim), x.shape) == layout


@pytest.mark.parametrize(
    ("shape", "dim", "view", "axis"),
    [
        ((BATCH, 3, 4), 0, (BATCH * 3, 4), Axis(0, after=3)),
        ((3, BATCH, 4), 1, (3 * BATCH, 4), Axis(0, before=3)),
        ((2, BATCH, 3, 4), 1, (2 * BATCH * 3, 4), Axis(0, before=2, after=3)),
        ((2, BATCH, 3, 4), 1, (2, BATCH * 3 * 4), Axis(1, after=12)),
        ((BATCH, 6), 0, (BATCH, 2, 3), Axis(0)),
    ],
)
def test_a_reshape_changes_nothing(shape: tuple[int, ...], dim: int, view: tuple[int, ...], axis: Axis) -> None:
    x, layout, owners = labelled(shape, dim)
    assert layout.axis(view) == axis
    assert torch.equal(layout.labels(view, x.device), owners.reshape(view))


def test_no_single_dimension_holds_the_samples() -> None:
    x, layout, owners = labelled((2, BATCH, 6), 1)
    across = (4, BATCH, 3)  # the last dimension was cut, and half of it is in front of the samples in memory now
    assert layout.axis(across) is None
    assert torch.equal(layout.labels(across, x.device), owners.reshape(across))


@pytest.mark.parametrize("labels", [None, torch.tensor([3, 0, 0, 4, 3, 3])], ids=["in turn", "picked"])
def test_what_belongs_to_each_sample(labels: Tensor | None) -> None:
    count = BATCH if labels is None else len(labels)
    x, layout, owners = labelled((2, count, 3), 1, labels)
    found = layout.by_sample(x, Axis(1))
    for sample in range(BATCH):
        own = x.transpose(0, 1)[owners[0, :, 0] == sample]  # the rows of this sample, (rows, 2, 3)
        assert torch.equal(found[sample, : len(own)], own)
        assert not found[sample, len(own) :].any()


def test_positions_and_features_of_each_sample() -> None:
    x, layout, _ = labelled((2, BATCH, 3, 4), 1)
    assert torch.equal(layout.sample_first(x, 4), x.transpose(0, 1).reshape(BATCH, 6, 4))
    with pytest.raises(ValueError, match="not in the leading dimensions"):
        layout.sample_first(x, 24)


def test_labels_are_read_back() -> None:
    _, layout, owners = labelled((2, BATCH, 3), 1)
    assert of_rows(*_read(owners)) == layout
    picked = torch.tensor([2, 2, 0, 4])
    _, layout, owners = labelled((4, 3), 0, picked)
    assert of_rows(*_read(owners)) == layout


def test_gaps_are_given_to_the_sample_around_them() -> None:
    _, _, owners = labelled((BATCH, 4), 0)
    gaps = torch.where(torch.arange(4) % 2 == 0, owners, NOBODY)
    assert torch.equal(without_gaps(gaps, [0]), owners)


def _read(owners: Tensor) -> tuple[int, Tensor, int, int]:
    outer, rows, inner = rows_in(owners)
    return outer, rows, inner, BATCH
