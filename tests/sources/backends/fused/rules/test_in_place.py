"""Operations in place where parameters take part: exact, or refused where other tensors share the memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from persample.errors import UnsupportedModelError
from persample.sources.contract import Check
from persample.testing.candidate import Candidate
from persample.testing.problem import Problem
from persample.testing.zoo.case import Net, robust

FUSED = Candidate("fused")
Function = Callable[[Net, Tensor], Tensor]


def problem(function: Function) -> Problem:
    torch.manual_seed(0)
    parameters = {"p": torch.randn(4), "q": torch.randn(4), "one": torch.randn(()), "matrix": torch.randn(4, 4)}
    model = Net(function, inner=nn.Linear(4, 4), **{name: nn.Parameter(p) for name, p in parameters.items()}).double()
    return Problem(model, torch.randn(3, 4).double(), torch.randn(3, 4).double(), robust)


# Parameters are written into constants.


def filled(m: Net, x: Tensor) -> Tensor:
    h = torch.zeros_like(x)
    h[:] = m.p
    return h * x


def triangular(m: Net, x: Tensor) -> Tensor:
    matrix = torch.zeros(4, 4, dtype=x.dtype)
    matrix[range(4), range(4)] = m.p.exp()
    matrix[1, 0] = m.one
    return x @ matrix


def between_the_writes(m: Net, x: Tensor) -> Tensor:
    h = torch.ones(4, dtype=x.dtype)
    h.mul_(m.p)
    before = h * x
    h[1:3] = m.q[:2]
    return before + h


def beside_samples(m: Net, x: Tensor) -> Tensor:
    h = torch.zeros_like(x)
    h[:, 0] = m.one
    h[:, 1:] = m.inner(x)[:, 1:] * m.p[0]
    return h.tanh() * m.q


# Parameters, or tensors made of them, are changed.


def changed_expression(m: Net, x: Tensor) -> Tensor:
    weight = m.matrix * 1
    before = x @ weight
    weight.clamp_(min=-0.5)
    weight[0] = m.p
    return before + x @ weight


def view_between(m: Net, x: Tensor) -> Tensor:
    h = torch.zeros(4, dtype=x.dtype)
    h[:] = m.p
    first = h[0]
    h[0] = m.q[1]
    return first * x


def view_changed(m: Net, x: Tensor) -> Tensor:
    weight = m.matrix * 1
    weight.diagonal().mul_(m.p)
    return x @ weight


def slice_zeroed(m: Net, x: Tensor) -> Tensor:
    bias = m.inner.bias.clone()  # as Swin V2 and BEiT leave out the bias of their keys
    before = x * bias
    bias[1:3].zero_()
    return before + torch.nn.functional.linear(x, m.inner.weight, bias)


def views_of_views(m: Net, x: Tensor) -> Tensor:
    weight = m.matrix.sin()
    rows = weight.t().unflatten(0, (2, 2))[1]
    first = x @ weight
    rows[0].add_(m.p)
    second = x[:, 2:] @ rows
    weight.mul_(m.one)
    third = x @ weight.t() + rows[0]
    rows[1, 1:3].copy_(m.q[:2]).neg_()
    weight[0] = rows[1]
    return first + third + x @ weight + second.sum(1, keepdim=True)


def chunked(m: Net, x: Tensor) -> Tensor:
    weight = m.matrix.sin()
    first, second = weight[:2], weight[2:]
    before = x @ first.t()
    first += second
    second -= first * 2
    return torch.cat([before, x @ first.t()], 1) + x @ weight


def entries_for_samples(m: Net, x: Tensor) -> Tensor:
    places = torch.ones(len(x), dtype=torch.long)
    table = torch.stack([m.p, m.q]) * 1
    looked_up = table[places]
    half = looked_up[:, :2]
    before = x[:, :2] + half
    looked_up.mul_(2)
    after = x[:, :2] - 3 * half
    half.add_(m.one)
    return torch.cat([before + after, x[:, 2:] * half * looked_up[:, 2:]], 1)


def samples_added(m: Net, x: Tensor) -> Tensor:
    h = m.p.expand(len(x), -1).clone()
    before = 2 - h
    h += x
    h.mul_(x).add_(m.q)
    return h * before


def samples_written(m: Net, x: Tensor) -> Tensor:
    h = m.p.repeat(len(x), 1)
    h[:, :2] = m.inner(x)[:, 2:]
    h.masked_fill_(x > 1, 0.0)
    return h.sin()


# Parameters change samples.


def samples_changed(m: Net, x: Tensor) -> Tensor:
    h = m.inner(x)
    h.addmm_(x, m.matrix).lerp_(m.p, m.q)
    h[:, 1:3] += m.p[:2]
    h[:, 0] *= m.one
    return h


def samples_filled(m: Net, x: Tensor) -> Tensor:
    h, g = m.inner(x), m.inner(x)
    h.masked_fill_(x > 0, m.one)
    h.index_fill_(1, torch.tensor([1]), m.p[0])
    h.index_put_((torch.arange(len(x)), (x[:, 0] > 0).long()), m.q[1])
    return h + g.fill_(m.q[2]) * x


def copied_into(m: Net, x: Tensor) -> Tensor:
    h = m.inner(x)
    h[:, :2].copy_(m.p[:2])
    h.view(-1, 2, 2).mul_(m.matrix[:2, :2])
    return h


SERVED = [
    filled,
    triangular,
    between_the_writes,
    beside_samples,
    changed_expression,
    view_between,
    view_changed,
    slice_zeroed,
    views_of_views,
    chunked,
    entries_for_samples,
    samples_added,
    samples_written,
    samples_changed,
    samples_filled,
    copied_into,
]


@pytest.mark.parametrize("check", ["never", "first"])
@pytest.mark.parametrize("function", SERVED)
def test_exact(function: Function, check: Check) -> None:
    verdict = FUSED.judge(problem(function), check)
    assert verdict.kind == "exact", verdict.reason


def view_before(m: Net, x: Tensor) -> Tensor:
    h = torch.zeros(4, dtype=x.dtype)
    first = h[0]
    h[:] = m.p
    return first * x


def view_of_constants_changed(m: Net, x: Tensor) -> Tensor:
    h = torch.zeros(4, dtype=x.dtype)
    before = h.detach()
    h[:] = m.p
    h[1:].mul_(m.q[1:])
    return before * h * x


def detached_view(m: Net, x: Tensor) -> Tensor:
    weight = m.matrix * 2
    first = weight.detach()[0]
    weight[0].mul_(3)
    return x @ weight * first.sum()


def view_of_samples_to_be(m: Net, x: Tensor) -> Tensor:
    h = m.p.repeat(len(x), 1)
    first = h[:, :1]
    h += x
    return first * h


def detached_before(m: Net, x: Tensor) -> Tensor:
    weight = m.matrix * 2
    detached = weight.detach()
    weight.mul_(3)
    return x @ weight * detached.sum()


def data_before(m: Net, x: Tensor) -> Tensor:
    weight = torch.zeros(4, 4, dtype=x.dtype)
    weight[:] = m.matrix
    first = weight.data[0]
    weight[0] = m.q
    return x @ weight * first.sum()


VIEWS = [
    view_before,
    view_of_constants_changed,
    view_of_samples_to_be,
    detached_before,
    detached_view,
    data_before,
]


@pytest.mark.parametrize("function", VIEWS)
def test_refused(function: Function) -> None:
    assert FUSED.judge(problem(function), "never").kind == "refused"


def test_what_pytorch_forbids_is_its_own_error() -> None:
    def changed(m: Net, x: Tensor) -> Tensor:
        return m.p.mul_(2) * x

    task = problem(changed)
    with pytest.raises(RuntimeError, match="leaf Variable") as raised:
        FUSED.source(task).moments(task.inputs, task.targets)
    assert not isinstance(raised.value, UnsupportedModelError)
