"""Sums, norms and products of one contribution, by its factors, against the gradients themselves in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from persample.sources.backends import shortcuts
from persample.sources.backends.contribution_blocks import Itself, SingleUse
from persample.sources.backends.contributions import Contribution, Terms
from persample.sources.backends.fused.linear import LinearProducts

SAMPLES = 5


def in_order(samples: int, positions: int, width: int) -> Tensor:
    return torch.randn(samples, positions, width)


def position_first(samples: int, positions: int, width: int) -> Tensor:
    return torch.randn(positions, samples, width).transpose(0, 1)


def columns(samples: int, positions: int, width: int) -> Tensor:
    return torch.randn(samples, width, positions).mT


def expanded(samples: int, positions: int, width: int) -> Tensor:
    return torch.randn(samples, 1, width).expand(-1, positions, -1)


LAYOUTS = (in_order, position_first, columns, expanded)


def compare(contribution: Contribution, g: Tensor) -> None:
    """Compare all that a block of `contribution` gives with what the gradients `g`, in float64, do."""
    weights = torch.rand(SAMPLES)
    block = SingleUse("p", 0, SAMPLES, contribution, Itself("p"), g[0].numel())
    rows = g.flatten(1) if g.dim() > 1 else g.unsqueeze(1)
    for each in (block, block.to_keep()):
        found = [*each.compute_moments_and_norms(), each.squared_norms(), each.weighted_sum(weights), each.gram()]
        norms = rows.square().sum(1)
        sums = g.sum(0), g.square().sum(0), norms, norms, torch.tensordot(weights.double(), g, 1), rows @ rows.mT
        for value, expected in zip(found, sums, strict=True):
            torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", [1, 4])
@pytest.mark.parametrize("sizes", [(3, 8), (8, 3)], ids=str)
@pytest.mark.parametrize("of_inputs", LAYOUTS)
@pytest.mark.parametrize("of_outputs", LAYOUTS)
def test_linear_products(
    of_outputs: Callable[..., Tensor], of_inputs: Callable[..., Tensor], sizes: tuple[int, int], positions: int
) -> None:
    torch.manual_seed(0)
    delta, a = of_outputs(SAMPLES, positions, sizes[0]), of_inputs(SAMPLES, positions, sizes[1])
    kept = delta.clone(), a.clone()
    compare(LinearProducts(delta, a), torch.einsum("blo,bli->boi", delta.double(), a.double()))
    assert torch.equal(delta, kept[0])
    assert torch.equal(a, kept[1])


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("positions", [1, 4])
def test_terms(positions: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    terms = torch.randn(SAMPLES, positions, *shape)
    kept = terms.clone()
    compare(Terms(terms), terms.double().sum(1))
    assert torch.equal(terms, kept)


def test_what_is_kept_of_terms_is_no_more_than_the_gradients() -> None:
    block = SingleUse("p", 0, SAMPLES, Terms(torch.randn(SAMPLES, 4, 3)), Itself("p"), 3)
    ((_, rows),) = block.to_keep().pieces()
    assert rows.untyped_storage().nbytes() == SAMPLES * 3 * 4


@pytest.mark.parametrize("numbers", [1, 100, 10**6])
def test_products_of_pieces(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortcuts, "_MEETING", numbers)
    torch.manual_seed(0)
    delta, a = in_order(SAMPLES, 4, 6), in_order(SAMPLES, 4, 8)
    rows = torch.einsum("blo,bli->boi", delta.double(), a.double()).flatten(1)
    found = shortcuts.products_of_pieces(LinearProducts(delta, a), SAMPLES, 48)
    torch.testing.assert_close(found.double(), rows @ rows.mT, rtol=1e-5, atol=1e-5)
