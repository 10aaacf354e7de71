"""Models that differentiate, transform or compile parts of themselves: exact or refused, with and without the check."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import persample
from persample.errors import BatchError
from persample.testing.candidate import Candidate
from persample.testing.problem import Problem
from persample.testing.zoo.case import Net, robust


def gradient_of_each(m: Net, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.grad(lambda row: m.inner(row).tanh().sum()))(x)


def mapped(m: Net, x: Tensor) -> Tensor:
    return torch.func.vmap(m.inner, in_dims=1, out_dims=1)(x.unsqueeze(1).expand(-1, 2, -1))


def other_weights(m: Net, x: Tensor) -> Any:
    return torch.func.functional_call(m.inner, {"weight": 2 * m.inner.weight, "bias": m.inner.bias}, (x,))


def a_step_of_gradient_descent(m: Net, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(m.inner(x).square().sum(), x)
    return m.outer(x - 0.1 * gradient)


@pytest.mark.parametrize("check", ["never", "first"])
@pytest.mark.parametrize("function", [gradient_of_each, mapped, other_weights, a_step_of_gradient_descent])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_exact_or_refused(backend: str, function: Any, check: Any) -> None:
    torch.manual_seed(0)
    model = Net(function, inner=nn.Linear(3, 3), outer=nn.Linear(3, 2)).double()
    inputs = torch.randn(4, 3).double()
    problem = Problem(model, inputs, torch.randn(model(inputs).shape).double(), robust)
    stream = "each" if backend == "vmap" else "batch"
    verdict = Candidate(backend, stream=stream).judge(problem, check)
    assert verdict.kind != "caught"
    assert verdict.kind == "exact" or backend != "loop"


def test_a_part_that_is_compiled(backend: str) -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    plain = nn.Sequential(nn.Linear(3, 3), inner, nn.Linear(4, 2)).double()
    compiled = nn.Sequential(plain[0], torch.compile(inner, backend="eager"), plain[2])
    inputs, targets = torch.randn(4, 3).double(), torch.arange(4) % 2
    found, expected = (
        persample.make_source(backend, model, persample.losses.cross_entropy).per_sample(inputs, targets)
        for model in (compiled, plain)
    )
    torch.testing.assert_close(list(found.values()), list(expected.values()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [Tensor.to_sparse, Tensor.to_sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_inputs_are_refused(backend: str, make: Any) -> None:
    source = persample.make_source(backend, nn.Linear(3, 2), persample.losses.cross_entropy)
    with pytest.raises(BatchError, match="to_dense"):
        source.moments(make(torch.eye(3)), torch.tensor([0, 1, 0]))


def test_integers_found_by_parameters() -> None:
    def pieces(m: Net, x: Tensor) -> Tensor:
        ends = m.widths.softmax(0).cumsum(0)
        return m.heights[torch.searchsorted(ends, x.sigmoid()).clamp(max=4)] * x

    torch.manual_seed(0)
    model = Net(pieces, widths=nn.Parameter(torch.randn(5)), heights=nn.Parameter(torch.randn(5))).double()
    problem = Problem(model, torch.randn(4, 3).double(), torch.randn(4, 3).double(), robust)
    assert Candidate("fused").judge(problem, "never").kind == "exact"
