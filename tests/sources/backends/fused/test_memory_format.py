"""The memory format of images, compared with PyTorch's own function."""

from __future__ import annotations

import subprocess
import sys

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._prims_common import suggest_memory_format

from persample.sources.backends.fused.memory_format import memory_format


@given(
    shape=st.lists(st.sampled_from([0, 1, 1, 2, 3]), min_size=2, max_size=6),
    order=st.randoms(use_true_random=False),
    gaps=st.booleans(),
    expanded=st.booleans(),
)
def test_by_strides(shape: list[int], order: object, gaps: bool, expanded: bool) -> None:
    dims = list(range(len(shape)))
    order.shuffle(dims)  # type: ignore[attr-defined]
    strides, step = [0] * len(shape), 1
    for dim in dims:
        strides[dim] = step
        step *= max(1, shape[dim]) + gaps
    if expanded:
        strides[dims[0]] = 0
    x = torch.empty_strided(shape, strides)
    assert memory_format(x) == suggest_memory_format(x)


def test_channels_last() -> None:
    x, y = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5, 6)
    assert memory_format(x) == memory_format(y) == memory_format(x[0]) == torch.contiguous_format
    assert memory_format(x.to(memory_format=torch.channels_last)) == torch.channels_last
    assert memory_format(y.to(memory_format=torch.channels_last_3d)) == torch.channels_last_3d


def test_the_first_call_does_not_wait_for_sympy() -> None:
    code = """
import sys, torch, persample
from torch import nn
model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
source = persample.make_source("fused", model, persample.losses.cross_entropy)
x, y = torch.randn(4, 1, 4, 4), torch.randint(0, 3, (4,))
source.moments(x, y), source.norms(x, y)
assert "sympy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
