"""Max pooling as PyTorch does it, bit for bit, ties and all, whichever kernel is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from persample.kernels import pooling as kernels
from persample.sources.backends.fused.rules import pooling

SETTINGS: list[tuple[Any, ...]] = [
    (2,),
    (2, 2),
    ([3, 2], [2, 1]),
    (3, 2, 1),
    (3, 1, 1, 2),
    (2, 2, 0, 1, True),
    (3, 2, 1, 1, True),
    (2, 3),
    ([2, 1], [3, 1], [1, 0]),
    ([2, 3], [2, 2]),
    (2, 4, 0, 2),
]


@pytest.mark.parametrize("form", ["as it lies", "channels last", "images side by side"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("channels", [1, 6, 16, 33])
def test_as_pytorch(settings: tuple[Any, ...], channels: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def take(key: object, forms: Any, *operands: Any) -> Any:
        return forms()[form](*operands)

    monkeypatch.setattr(kernels, "choose", take)
    torch.manual_seed(0)
    x = torch.randn(6, channels, 11, 13).round().requires_grad_()  # rounded, so that there are ties
    expected = F.max_pool2d(x, *settings)
    found = pooling.max_pool2d(x, *settings)
    assert torch.equal(found, expected)
    assert found.is_contiguous()
    delta = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, x, delta)[0]
    assert torch.equal(torch.autograd.grad(found, x, delta)[0], wanted)


@pytest.mark.parametrize("form", ["as it lies", "channels last", "images side by side"])
def test_strides_are_known_beforehand(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "choose", lambda key, forms, *operands: forms()[form](*operands))
    for shape in (6, 16, 4, 4), (6, 1, 8, 8), (6, 1, 4, 4):
        settings = ([4, 4], [], [0, 0], [1, 1], False)
        for t in kernels.max_pool2d(torch.randn(shape), *settings):
            assert t.stride() == torch.empty(t.shape).stride()


@pytest.mark.parametrize(
    ("batch", "channels", "images"), [(128, 6, 16), (128, 10, 8), (7, 10, 7), (4, 1, 4), (128, 64, 1), (3, 100, 1)]
)
def test_enough_channels_side_by_side(batch: int, channels: int, images: int) -> None:
    assert kernels._images_side_by_side(batch, channels) == images
    assert ("images side by side" in kernels._forms(torch.empty(batch, channels, 4, 4))) == (images > 1)


@pytest.mark.parametrize("x", [torch.randn(3, 8, 8), torch.randn(2, 8, 8, 3).movedim(3, 1)], ids=["no batch", "last"])
def test_other_shapes_and_orders_are_left_to_pytorch(x: Tensor) -> None:
    assert torch.equal(pooling.max_pool2d(x, 2), F.max_pool2d(x, 2))


def test_indices_are_returned_when_asked_for() -> None:
    x = torch.randn(2, 3, 8, 8)
    for found, expected in zip(
        pooling.max_pool2d(x, 2, return_indices=True), F.max_pool2d(x, 2, return_indices=True), strict=True
    ):
        assert torch.equal(found, expected)
