"""Nothing of a batch stays alive after a call, not even until the garbage collector comes."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import persample


@pytest.mark.parametrize("method", ["moments", "per_sample"])
def test_no_tensor_of_a_call_stays_alive(backend: str, method: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 36, 3))
    inputs, targets = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    call = getattr(persample.make_source(backend, model, persample.losses.cross_entropy), method)
    call(inputs, targets)  # the first call also checks
    gc.collect()
    gc.disable()
    try:
        before = _tensors()
        for _ in range(3):
            call(inputs, targets)
        assert _tensors() == before
    finally:
        gc.enable()


def _tensors() -> int:
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
