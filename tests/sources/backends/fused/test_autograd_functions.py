"""Custom functions of autograd that take samples and parameters: exact by `fused`, or refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import persample
from persample.errors import PersampleError


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, factor: float = 1.0) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.factor = factor
        result = factor * (x @ w.t())
        return result if b is None else result + b

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Any:
        x, w = ctx.saved_tensors
        of_bias = delta.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        of_weight = ctx.factor * delta.flatten(0, -2).t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return ctx.factor * delta @ w, of_weight, of_bias, None


class TwoResults(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(w, x)
        return x * w, x + w

    @staticmethod
    def backward(ctx: Any, product: Tensor, total: Tensor) -> Any:
        w, x = ctx.saved_tensors
        dims = tuple(range(x.dim() - 1))
        return (product * x + total).sum(dims), product * w + total


class Clipping(torch.autograd.Function):
    """Its backward pass is not linear, so the gradients of the samples depend on each other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Any:
        x, w = ctx.saved_tensors
        delta = delta / delta.norm()
        return delta * w, (delta * x).flatten(0, -2).sum(0)


class Net(nn.Module):
    def __init__(self, function: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.w, self.b, self.v = (nn.Parameter(torch.randn(*shape)) for shape in ((4, 4), (4,), (4,)))
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.function(self, x).tanh())
        return out.flatten(1).logsumexp(1).unsqueeze(1) * torch.ones(3).to(x)


def both_results(m: Net, x: Tensor) -> Tensor:
    product, total = TwoResults.apply(m.v, x)
    return product * total


SERVED: Mapping[str, Callable[[Net, Tensor], Tensor]] = {
    "of the inputs": lambda m, x: Linear.apply(x, m.w, None),
    "of samples with a gradient": lambda m, x: Linear.apply(m.inner(x).tanh(), m.w, None),
    "weight and bias": lambda m, x: Linear.apply(m.inner(x), m.w, m.b, 0.5),
    "twice": lambda m, x: Linear.apply(Linear.apply(x, m.w, None).tanh(), m.w, m.b),
    "and elsewhere": lambda m, x: Linear.apply(m.inner(x), m.w, m.v) * m.v + x @ m.w,
    "an expression": lambda m, x: Linear.apply(m.inner(x), m.w * m.w.sigmoid(), m.b.exp()),
    "samples in dim 1": lambda m, x: Linear.apply(m.inner(x).transpose(0, 1), m.w, None).transpose(0, 1),
    "picked rows": lambda m, x: Linear.apply(m.inner(x).flip(0), m.w, m.b).flip(0),
    "frozen weight": lambda m, x: Linear.apply(m.inner(x), m.w.detach(), m.b),
    "two results": both_results,
    "one of two results": lambda m, x: TwoResults.apply(m.v, m.inner(x))[1],
}


def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.sum(1) - targets).square()


def truth(model: Net, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    rows = []
    for i in range(len(x)):
        loss = loss_fn(model(x[i : i + 1]), y[i : i + 1]).sum()
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for g, p in zip(found, model.parameters(), strict=True)])
    return {
        name: torch.stack(g) for (name, _), g in zip(model.named_parameters(), zip(*rows, strict=True), strict=True)
    }


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize(("batch", "positions"), [(5, 2), (3, 3), (1, 2)])
def test_served(name: str, batch: int, positions: int) -> None:
    torch.manual_seed(0)
    model, x = Net(SERVED[name]).double(), torch.randn(batch, positions, 4, dtype=torch.float64)
    y = torch.randn(batch, dtype=torch.float64)
    source = persample.make_source("fused", model, loss_fn, check="never")
    expected = truth(model, x, y)
    torch.testing.assert_close(source.per_sample(x, y), expected)
    moments = source.moments(x, y)
    torch.testing.assert_close(dict(moments.mean), {k: g.mean(0) for k, g in expected.items()})
    torch.testing.assert_close(dict(moments.second_moment), {k: g.square().mean(0) for k, g in expected.items()})


@pytest.mark.parametrize("name", SERVED)
def test_explained_and_recorded_as_served(name: str) -> None:
    torch.manual_seed(0)
    model, x = Net(SERVED[name]).double(), torch.randn(4, 2, 4, dtype=torch.float64)
    y = torch.randn(4, dtype=torch.float64)
    explained = persample.explain(model, x, y, loss_fn)
    assert explained.supported, explained
    source = persample.make_source("fused", model, loss_fn)
    for _ in range(2):  # the second time there are gradients already
        with source.recording() as recorded:
            loss_fn(model(x), y).mean().backward()
        squares = {name: g.square().mean(0) for name, g in truth(model, x, y).items()}
        torch.testing.assert_close(dict(recorded.moments().second_moment), squares)


class Unseen(torch.autograd.Function):
    """Nobody sees where the samples are in its result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        with torch._C.DisableTorchFunction():
            return x * w

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return delta * w, (delta * x).flatten(0, -2).sum(0)


@pytest.mark.parametrize("function", [Clipping, Unseen])
def test_refused(function: Any) -> None:
    model = Net(lambda m, x: function.apply(m.inner(x), m.v)).double()
    source = persample.make_source("fused", model, loss_fn, check="never")
    x, y = torch.randn(4, 2, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    with pytest.raises(PersampleError, match=r"autograd\.Function"):
        source.per_sample(x, y)
    with pytest.raises(PersampleError, match=r"autograd\.Function"), source.recording():
        loss_fn(model(x), y).mean().backward()
    assert "autograd.Function" in str(persample.explain(model, x, y, loss_fn))


def test_nothing_remains_on_a_graph_that_outlives_the_call() -> None:
    """Its backward pass is called as ever after that."""
    model = Net(SERVED["and elsewhere"]).double()
    x, y = torch.randn(4, 2, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    kept: list[Tensor] = []

    def keeping(outputs: Tensor, targets: Tensor) -> Tensor:
        kept.append(loss_fn(outputs, targets))
        return kept[-1]

    persample.make_source("fused", model, keeping, check="never").per_sample(x, y)
    loss_fn(model(x), y).sum().backward()
    torch.testing.assert_close(model.w.grad, truth(model, x, y)["w"].sum(0))


@pytest.mark.parametrize("seed", range(4))
def test_gradients_of_samples_that_cancel_are_no_mixing(seed: int) -> None:
    torch.manual_seed(seed)
    model, x = Net(lambda m, x: Linear.apply(m.inner(x), m.w, m.b)), torch.randn(3, 2, 4)
    x, signs = torch.cat([x, x * (1 + 1e-6)]), torch.tensor([1.0] * 3 + [-1.0] * 3)
    source = persample.make_source("fused", model, lambda outputs, targets: 1e3 * outputs.sum(1) * targets)
    rows = source.per_sample(x, signs)["w"]
    assert rows.sum(0).norm() < 1e-4 * rows.norm()
