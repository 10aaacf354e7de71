"""What is remembered of an operation depends on all that says where the samples are, values of constants too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import persample
from persample.errors import UnsupportedModelError
from persample.sources.contract import Check
from persample.testing.devices import on_cuda
from persample.testing.zoo.case import Net, parameter


def loss_fn(outputs: Tensor, targets: Any = None) -> Tensor:
    flat = outputs.reshape(len(outputs), -1)
    return (flat.sin() * torch.linspace(1, 2, flat.shape[1], dtype=flat.dtype)).sum(1)


def assert_exact(model: Any, x: Tensor, check: Check) -> None:
    rows = [torch.autograd.grad(loss_fn(model(x[i : i + 1])).sum(), list(model.parameters())) for i in range(len(x))]
    found = persample.make_source("fused", model, loss_fn, check=check).per_sample(x, None)
    for name, row in zip(found, zip(*rows, strict=True), strict=True):
        torch.testing.assert_close(found[name], torch.stack(row), rtol=1e-9, atol=1e-12)


def padded(m: Any, x: Tensor, width: Tensor) -> Tensor:
    """A 0-dim tensor stands for a number; the slice hides the difference in shape."""
    return F.pad((x * m.scale).unsqueeze(1), (width, width), mode="reflect")[..., :5]


def classes(m: Any, x: Tensor, number: Tensor) -> Tensor:
    h = x * m.scale
    return h * F.one_hot(h.argmax(-1), number + 4)[..., :4]


NUMBERS = {function: [torch.tensor(1), torch.tensor(2), torch.tensor(1)] for function in (padded, classes)}


@pytest.mark.parametrize("check", ["never", "first"])
@pytest.mark.parametrize("function", NUMBERS)
def test_a_tensor_that_stands_for_a_number(function: Callable[..., Tensor], check: Check) -> None:
    torch.manual_seed(0)
    model, x = Net(function, scale=parameter(4)).double(), torch.randn(3, 4).double()
    for number in NUMBERS[function]:
        model.function = lambda m, x, n=number: function(m, x, n)
        assert_exact(model, x, check)
    model.function = lambda m, x: sum(function(m, x, n).sum(1) for n in NUMBERS[function])
    assert_exact(model, x, check)


def picked(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    """Entries of the samples or of their transpose, where the mask says."""
    h = x * m.scale
    return torch.where(mask, h, h.T)


def repeated(m: Any, x: Tensor, repeats: Tensor) -> Tensor:
    """Rows of samples are repeated, and those at some places are taken."""
    return (x * m.scale).repeat_interleave(repeats, 0)[[0, 1, 3]]


def sampled(m: Any, x: Tensor, grid: Tensor) -> Tensor:
    """Positions say from which sample an entry comes."""
    return F.grid_sample((x * m.scale).view(1, 1, 3, 3), grid, mode="nearest", align_corners=True).view(3, 3)


def spread(m: Any, x: Tensor, adjacency: Tensor) -> Tensor:
    """The entries that a sparse matrix leaves out decide which samples meet."""
    return torch.sparse.mm(adjacency.to(x.dtype).to_sparse(), x * m.scale)


def summed(m: Any, x: Tensor, places: Tensor) -> Tensor:
    return torch.zeros_like(x).index_add(0, places, x * m.scale)


def grid(rows: list[float]) -> Tensor:
    """Positions of a picture of three rows, taken in this order."""
    row = torch.tensor(rows).double().view(3, 1).expand(3, 3)
    return torch.stack([torch.linspace(-1, 1, 3).double().expand(3, 3), row], -1).unsqueeze(0)


# Constants of one shape: with the first the samples stay apart, and with the second they do not.
CONSTANTS: dict[Callable[..., Tensor], tuple[Tensor, Tensor]] = {
    picked: (torch.ones(3, 3, dtype=torch.bool), torch.eye(3, dtype=torch.bool)),
    repeated: (torch.tensor([1, 2, 1]), torch.tensor([2, 1, 1])),
    sampled: (grid([-1, 0, 1]), grid([0, -1, 1])),
    spread: (torch.eye(3), torch.ones(3, 3)),
    summed: (torch.tensor([0, 1, 2]), torch.tensor([1, 0, 2])),
}


@pytest.mark.parametrize(
    "function",
    [f for f in CONSTANTS if not (on_cuda() and f is spread)],  # a kernel of a GPU's that is refused
)
def test_values_of_constants(function: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 3).double()
    apart, mixing = CONSTANTS[function]
    for _ in range(2):
        model = Net(lambda m, x: function(m, x, apart), scale=parameter(3)).double()
        found = persample.make_source("fused", model, loss_fn, check="never").per_sample(x, None)["scale"]
        losses = loss_fn(model(x))
        rows = [torch.autograd.grad(loss, model.scale, retain_graph=True)[0] for loss in losses]
        torch.testing.assert_close(found, torch.stack(rows), rtol=1e-9, atol=1e-12)
        model.function = lambda m, x: function(m, x, mixing)
        with pytest.raises(UnsupportedModelError):
            persample.make_source("fused", model, loss_fn, check="never").per_sample(x, None)
