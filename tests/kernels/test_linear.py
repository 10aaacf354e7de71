"""Each form of a linear layer's products against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from persample.kernels import linear
from persample.kernels.linear import many_positions, one_position

SIZES = [(1, 1, 1), (7, 3, 5), (128, 10, 84), (33, 400, 130)]  # B, O, I


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_one_position(size: tuple[int, int, int]) -> None:
    batch, outputs, inputs = size
    torch.manual_seed(0)
    delta, a = torch.randn(batch, outputs), torch.randn(batch, inputs)
    kept = delta.clone(), a.clone()
    g = delta.double().unsqueeze(2) * a.double().unsqueeze(1)
    for name, form in one_position(a).items():
        for found, expected in zip(form(delta, a), (g.sum(0), g.square().sum(0)), strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4, msg=name)
    assert torch.equal(delta, kept[0])
    assert torch.equal(a, kept[1])


@pytest.mark.parametrize("positions", [2, 65])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_many_positions(size: tuple[int, int, int], positions: int) -> None:
    batch, outputs, inputs = size
    torch.manual_seed(0)
    delta, a = torch.randn(batch, positions, outputs), torch.randn(batch, positions, inputs)
    g = torch.einsum("blo,bli->boi", delta.double(), a.double())
    for name, form in many_positions(delta, a).items():
        for found, expected in zip(form(delta, a), (g.sum(0), g.square().sum(0)), strict=True):
            error = (found.double() - expected).norm() / expected.norm()
            assert error < 1e-5, name


@pytest.mark.parametrize("outputs", [8, 50], ids=["formed", "from products"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_norms_where_positions_cancel(outputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a = torch.randn(5, 1, 40, dtype=dtype) + 1e-4 * torch.randn(5, 6, 40, dtype=dtype)
    delta = torch.randn(5, 6, outputs, dtype=dtype)
    delta[::2] -= delta[::2].mean(1, keepdim=True)
    delta[4] = 0
    assert linear.norms_from_products(6, outputs, 40) == (outputs == 50)
    expected = torch.einsum("blo,bli->boi", delta.double(), a.double()).flatten(1).square().sum(1)
    found = linear.linear_squared_norms(a, delta)
    torch.testing.assert_close(found.double(), expected, rtol=1e-9 if dtype == torch.float64 else 1e-3, atol=0)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("contiguous", [True, False])
def test_the_layer_itself_whichever_product_is_taken(
    size: tuple[int, int, int], contiguous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, outputs, inputs = size
    torch.manual_seed(0)
    x, delta, bias = torch.randn(rows, inputs), torch.randn(rows, outputs), torch.randn(outputs)
    weight = torch.randn(outputs, inputs) if contiguous else torch.randn(inputs, outputs).mT
    seen = []

    def each(key: object, forms: Any, *operands: Any) -> tuple[torch.Tensor]:
        results = [form(*operands) for form in forms().values()]
        seen.append(len(results))
        for result in results[1:]:
            torch.testing.assert_close(result[0], results[0][0], rtol=1e-4, atol=1e-4)
        return results[-1]

    monkeypatch.setattr(linear, "choose", each)
    expected = x.double() @ weight.double().mT
    for given in (bias, None):
        found = linear.linear_outputs(x, weight, given).double()
        torch.testing.assert_close(found, expected + (0 if given is None else given.double()), rtol=1e-4, atol=1e-4)
    found = linear.linear_gradient_of_inputs(delta, weight, [len(delta)]).double()
    torch.testing.assert_close(found, delta.double() @ weight.double(), rtol=1e-4, atol=1e-4)
    assert len(seen) == 3
