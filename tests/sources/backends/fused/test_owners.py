"""Rows that belong to no sample until they meet those of one: states that sequences begin with, packed backwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import persample
from persample.errors import UnsupportedModelError

LENGTHS = torch.tensor([3, 1, 2, 3])

Step = Callable[["Backwards", Tensor, Tensor], Tensor]


class Backwards(nn.Module):
    """Runs through packed sequences from their ends, with `step` from the rows and states of a time to new states."""

    def __init__(self, step: Step, start: float = 0.0) -> None:
        super().__init__()
        self.step, self.start = step, start
        self.wi, self.wh, self.bias = (nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (4, 4), (4,)))
        self.gates = nn.Linear(4, 12)
        self.rnn, self.gru = nn.RNNCell(3, 4), nn.GRUCell(3, 4)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        h = x.new_zeros(0, 4)
        for rows in reversed(packed.data.split(packed.batch_sizes.tolist())):
            h = torch.cat([h, h.new_full((len(rows) - len(h), 4), self.start)])
            h = self.step(self, rows, h)
        return h[packed.unsorted_indices]


def linear(net: Backwards, rows: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(F.linear(rows, net.wi) + F.linear(h, net.wh))


def with_bias(net: Backwards, rows: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(F.linear(h, net.wh, net.bias).add(F.linear(rows, net.wi)))


def with_bias_behind(net: Backwards, rows: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(2 * (F.linear(h, net.wh) + net.bias) + F.linear(rows, net.wi))


def scaled(net: Backwards, rows: Tensor, h: Tensor) -> Tensor:
    """As independent recurrent units do."""
    return torch.tanh((h * net.bias - net.wh[0]).relu() + F.linear(rows, net.wi))


def product(net: Backwards, rows: Tensor, h: Tensor) -> Tensor:
    return torch.sigmoid(h @ net.wh) * F.linear(rows, net.wi) + h


def two_layers(net: Backwards, rows: Tensor, h: Tensor) -> Tensor:
    u, v = F.linear(h, net.wh), F.linear(h, net.wh.t())
    a = F.linear(rows, net.wi) + u
    return a.tanh() + v.relu()


def parts(net: Backwards, rows: Tensor, h: Tensor) -> Tensor:
    r, z, n = net.gates(h).chunk(3, -1)
    a = F.linear(rows, net.wi, net.bias)
    r, z = (a + r).sigmoid(), (a - z).sigmoid()
    return (1 - z) * (a + r * n).tanh() + z * h


def rnn_cell(net: Backwards, rows: Tensor, h: Tensor) -> Tensor:
    return net.rnn(rows, h)


def gru_cell(net: Backwards, rows: Tensor, h: Tensor) -> Tensor:
    return net.gru(rows, h)


def of_two_samples(net: Backwards, rows: Tensor, h: Tensor) -> Tensor:
    """The rows of states meet those of one sample first, of another then."""
    u = F.linear(h, net.wh)
    return (F.linear(rows, net.wi) + u + u.flip(0)).tanh()


def their_sum(net: Backwards, rows: Tensor, h: Tensor) -> Tensor:
    return (F.linear(rows, net.wi) + F.linear(h, net.wh).sum(0)).tanh()


def scaled_sum(net: Backwards, rows: Tensor, h: Tensor) -> Tensor:
    return (F.linear(rows, net.wi) + (h + net.bias).sum(0)).tanh()


def scaled_of_two_samples(net: Backwards, rows: Tensor, h: Tensor) -> Tensor:
    u = h * net.bias + 1
    return (F.linear(rows, net.wi) + u + (u * net.bias).flip(0)).tanh()


def loss_fn(outputs: Tensor, targets: Any) -> Tensor:
    return outputs.square().sum(1) + outputs.sin()[:, 0]


def problem(step: Step, start: float) -> tuple[Backwards, Tensor]:
    torch.manual_seed(0)
    return Backwards(step, start).double(), torch.randn(4, 3, 3).double()


@pytest.mark.parametrize("start", [0.0, 0.5])
@pytest.mark.parametrize(
    "step", [linear, with_bias, with_bias_behind, scaled, product, two_layers, parts, rnn_cell, gru_cell]
)
def test_belong_to_the_sample_that_they_meet(step: Step, start: float) -> None:
    model, x = problem(step, start)
    parameters = dict(model.named_parameters())
    rows = []
    for i in range(4):
        loss = loss_fn(model(x[i : i + 1], LENGTHS[i : i + 1]), None).sum()
        g = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        rows.append(dict(zip(parameters, g, strict=True)))
    source = persample.make_source("fused", model, loss_fn, check="never")
    found, moments = source.per_sample((x, LENGTHS), None), source.moments((x, LENGTHS), None)
    for name in parameters:
        expected = torch.stack([row[name] for row in rows])
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(moments.second_moment[name], expected.square().mean(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("step", [of_two_samples, their_sum, scaled_sum, scaled_of_two_samples])
def test_that_meet_several_samples_are_refused(step: Step) -> None:
    model, x = problem(step, 0.0)
    with pytest.raises(UnsupportedModelError):
        persample.make_source("fused", model, loss_fn, check="never").moments((x, LENGTHS), None)
