"""Look-ups of rows by numbers."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from persample.kernels.lookups import unique_at_most


@given(values=st.lists(st.integers(0, 6), min_size=1, max_size=12), rows=st.integers(1, 3))
def test_unique_at_most_is_unique_with_zeros_behind_it(values: list[int], rows: int) -> None:
    numbers = torch.tensor(values * rows).view(rows, -1)
    found, place = unique_at_most(numbers)
    unique, inverse = numbers.unique(return_inverse=True)
    assert found.tolist() == unique.tolist() + [0] * (numbers.numel() - len(unique))
    assert torch.equal(place, inverse)
