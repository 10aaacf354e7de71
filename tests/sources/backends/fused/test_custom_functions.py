"""Custom functions of autograd on parameters: exact, or refused where samples may take part unseen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from persample.sources.contract import Check
from persample.testing.candidate import Candidate
from persample.testing.problem import Problem
from persample.testing.zoo.case import Net, robust

FUSED = Candidate("fused")
Function = Callable[[Net, Tensor], Tensor]


class Clipped(torch.autograd.Function):
    """Clips in the forward pass, and looks at values in the backward pass, which cannot be mapped over samples."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return weight.clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Tensor:
        (weight,) = ctx.saved_tensors
        return delta * (weight.abs() <= 1) if delta.abs().max().item() > 0 else delta


class ThroughSign(torch.autograd.Function):
    """The sign, whose gradient goes straight through."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.sign()

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Tensor:
        return delta


class Passed(torch.autograd.Function):
    """Passes its first argument on, and gives the second one a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Any:
        return delta, (delta * ctx.saved_tensors[0]).sum(0)


class TwoSides(torch.autograd.Function):
    """Two results of two parameters."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(p, q)
        return p * q, p + q

    @staticmethod
    def backward(ctx: Any, product: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        p, q = ctx.saved_tensors
        return product * q + total, product * p + total


class BackwardInside(torch.autograd.Function):
    """Gives a parameter its gradient by a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, hidden: nn.Parameter) -> Tensor:
        ctx.hidden = hidden
        return weight * hidden.detach()

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Any:
        with torch.enable_grad():
            (ctx.hidden * delta).sum().backward()
        return delta * ctx.hidden.detach(), None


def problem(function: Function) -> Problem:
    torch.manual_seed(0)
    parameters = {"p": torch.randn(4), "q": torch.randn(4), "matrix": torch.randn(4, 4)}
    model = Net(function, inner=nn.Linear(4, 4), **{name: nn.Parameter(p) for name, p in parameters.items()}).double()
    return Problem(model, torch.randn(3, 4).double(), torch.randn(3, 4).double(), robust)


def weight(m: Net, x: Tensor) -> Tensor:
    return F.linear(m.inner(x), Clipped.apply(m.matrix), m.p)


def sign(m: Net, x: Tensor) -> Tensor:
    return F.linear(x, ThroughSign.apply(m.matrix) * m.matrix.abs().mean())


def several_uses(m: Net, x: Tensor) -> Tensor:
    clipped = Clipped.apply(m.inner.weight)
    return F.linear(m.inner(x).tanh(), clipped) + x @ clipped[1:].T[:, :1] * clipped.diagonal()


def of_an_expression(m: Net, x: Tensor) -> Tensor:
    return x * Clipped.apply(m.p * 2 + m.q.exp()) + m.p


def two_results(m: Net, x: Tensor) -> Tensor:
    product, total = TwoSides.apply(m.p, m.q)
    return m.inner(x * product) + total


def of_each_other(m: Net, x: Tensor) -> Tensor:
    return x @ ThroughSign.apply(Clipped.apply(m.matrix).cumsum(0)).tanh()


def changed_afterwards(m: Net, x: Tensor) -> Tensor:
    clipped = ThroughSign.apply(m.p)
    before = x * clipped
    clipped.mul_(m.q)
    clipped[1] = m.p[0]
    return before + m.inner(x) * clipped


SERVED = [weight, sign, several_uses, of_an_expression, two_results, of_each_other, changed_afterwards]


@pytest.mark.parametrize("check", ["never", "first"])
@pytest.mark.parametrize("function", SERVED)
def test_exact(function: Function, check: Check) -> None:
    verdict = FUSED.judge(problem(function), check)
    assert verdict.kind == "exact", verdict.reason


def samples_passed(m: Net, x: Tensor) -> Tensor:
    return Passed.apply(x, m.p) * m.q


def samples_of_parameters_passed(m: Net, x: Tensor) -> Tensor:
    return Passed.apply(m.inner(x), m.p) * m.q


def hidden_backward(m: Net, x: Tensor) -> Tensor:
    return m.inner(x) * BackwardInside.apply(m.p, m.q)


def in_a_checkpoint(m: Net, x: Tensor) -> Tensor:
    return checkpoint(lambda h: F.linear(h, Clipped.apply(m.matrix)), m.inner(x), use_reentrant=False)


REFUSED = [samples_passed, samples_of_parameters_passed, hidden_backward, in_a_checkpoint]


@pytest.mark.parametrize("function", REFUSED)
def test_refused(function: Function) -> None:
    assert FUSED.judge(problem(function), "never").kind == "refused"
