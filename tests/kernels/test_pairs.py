"""The products of all pairs of gradients against float64, on both sides of every switch."""

from __future__ import annotations

import pytest
import torch

from persample.kernels import autotune, pairs

SIZES = [(3, 5, 7), (1, 1, 1), (0, 4, 3), (4, 3, 0), (64, 17, 1100), (64, 0, 1100), (33, 64, 2048)]  # n, m, P


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_form(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, others, width = size
    torch.manual_seed(0)
    g, h = torch.randn(rows, width, dtype=dtype), torch.randn(others, 2 * width, dtype=dtype)[:, ::2]
    for left, right in ((g, h), (h, g), (g, g), (g.T.contiguous().T, h)):
        expected = left.double() @ right.double().T
        found = [pairs.products_of_pairs(left, right)]
        if 0 not in size:
            found += [result for form in pairs.forms(g).values() for result in form(left, right)]
        with autotune.deterministic_choice(True):
            found.append(pairs.products_of_pairs(left, right))
        for products in found:
            assert products.dtype == dtype
            torch.testing.assert_close(products.double(), expected, rtol=1e-5, atol=1e-3)
    torch.library.opcheck(pairs.products_of_pairs, (g, h))


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \(n, P\) and \(m, P\)"):
        pairs.products_of_pairs(torch.zeros(3, 4), torch.zeros(3, 5))
