"""Parameters that are used several times: by slices that share no entry, and by others."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import persample


class Slices(nn.Module):
    """Applies slices of one tensor of weights, `(6, 4, 4)`, and of one matrix, `(8, 4)`."""

    def __init__(self, use: Callable[[Slices, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts, self.rows = nn.Parameter(torch.randn(6, 4, 4)), nn.Parameter(torch.randn(8, 4))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def by_number(model: Slices, x: Tensor) -> Tensor:
    return sum((F.linear(x, model.experts[i]).tanh() for i in (0, 3, 5)), x)


def by_numbers_in_tensors(model: Slices, x: Tensor) -> Tensor:
    return sum((F.linear(x, model.experts[i]).tanh() for i in torch.arange(6)), x)


def by_samples(model: Slices, x: Tensor) -> Tensor:
    """As experts are applied, each to the rows of some samples."""
    chosen, out = (x.abs().sum(-1) * 10).long() % 6, torch.zeros_like(x)
    for i in range(6):
        rows = torch.where(chosen == i)
        if len(rows[0]):
            out = out.index_put(rows, F.linear(x[rows], model.experts[i]).tanh())
    return out


def chunks(model: Slices, x: Tensor) -> Tensor:
    first, second = model.rows.chunk(2)
    return F.linear(x, first).tanh() * (x @ second)


def of_other_columns(model: Slices, x: Tensor) -> Tensor:
    return F.linear(x[..., :2], model.rows[:, :2]).tanh() + F.linear(x[..., 2:], model.rows[:, 2:])


def shifted(model: Slices, x: Tensor) -> Tensor:
    """The slices share rows."""
    return F.linear(x, model.rows[:4]).tanh() + F.linear(x, model.rows[3:7])


def every_other_row(model: Slices, x: Tensor) -> Tensor:
    return F.linear(x, model.rows[::2]).tanh() + F.linear(x, model.rows[1::2])


def the_same_again(model: Slices, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, model.experts[1]).tanh(), model.experts[1])


def and_all_of_them(model: Slices, x: Tensor) -> Tensor:
    return F.linear(x, model.experts[1]).tanh() + F.linear(x, model.experts[2]) * model.experts.sum()


def copies_of_slices(model: Slices, x: Tensor) -> Tensor:
    return F.linear(x, model.rows[:4].clone()).tanh() + F.linear(x, model.rows[4:].mT.contiguous())


def unused_slices(model: Slices, x: Tensor) -> Tensor:
    F.linear(x, model.experts[4])
    return F.linear(x, model.experts[1]).tanh() + F.linear(x, model.experts[2].mT) + model.rows[0] * model.rows[1]


USES = (
    *(by_number, by_numbers_in_tensors, by_samples, chunks, of_other_columns, shifted, every_other_row),
    *(the_same_again, and_all_of_them, copies_of_slices, unused_slices),
)


def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.flatten(1).sin().sum(1) * (1 + targets)


def one_by_one(model: nn.Module, x: Tensor, y: Tensor) -> Mapping[str, Tensor]:
    parameters = dict(model.named_parameters())
    rows = []
    for i in range(len(x)):
        loss = loss_fn(model(x[i : i + 1]), y[i : i + 1]).sum()
        rows.append(torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True))
    return {name: torch.stack(g) for name, g in zip(parameters, zip(*rows, strict=True), strict=True)}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("use", USES)
def test_slices(use: Callable[[Slices, Tensor], Tensor], transposed: bool) -> None:
    model, x, y = Slices(use).double(), torch.randn(5, 3, 4).double(), torch.arange(5) % 3
    if transposed:  # its entries lie in memory in another order than its own
        model.rows = nn.Parameter(model.rows.detach().mT.contiguous().mT)
        model.experts = nn.Parameter(torch.randn(4, 6, 4).double().transpose(0, 1))
    truth = one_by_one(model, x, y)
    source = persample.make_source("fused", model, loss_fn, check="never")
    moments = source.moments(x, y)
    torch.testing.assert_close(dict(moments.mean), {name: g.mean(0) for name, g in truth.items()})
    squares = {name: g.square().mean(0) for name, g in truth.items()}
    torch.testing.assert_close(dict(moments.second_moment), squares)
    torch.testing.assert_close(source.per_sample(x, y), dict(truth))
