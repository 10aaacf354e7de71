"""Parameters beside samples that are mixed: served as long as the losses do not depend on it, else refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import persample
from persample.errors import UnsupportedModelError

Side = Callable[["TwoTowers", Tensor, Tensor], Any]


class TwoTowers(nn.Module):
    """Embeds two views of each sample, and returns something made of all samples beside them."""

    def __init__(self, side: Side) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(5, 3)
        self.scale, self.matrix = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.randn(3, 3))
        self.side = side

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Return both embeddings and the side output."""
        a, b = self.first(x), self.second(y)
        return {"a": a, "b": b, "side": self.side(self, a, b)}


def table(net: TwoTowers, a: Tensor, b: Tensor) -> Tensor:
    """The similarity of every first view with every second one, as CLIP returns it."""
    return a @ b.T * net.scale.exp() + net.matrix[0, 0]


def table_of_inputs(net: TwoTowers, a: Tensor, b: Tensor) -> Tensor:
    """The same of tensors without gradient, so that only the parameter would get one."""
    return a.detach() @ b.detach().T * net.scale


def statistic(net: TwoTowers, a: Tensor, b: Tensor) -> Tensor:
    return a.mean() * net.scale


def layer_on_the_mean(net: TwoTowers, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(a.mean(0), net.matrix).relu()


def parts(net: TwoTowers, a: Tensor, b: Tensor) -> Any:
    return torch.broadcast_tensors(a.mean(0), net.matrix)


def own_loss(net: TwoTowers, a: Tensor, b: Tensor) -> Tensor:
    return F.cross_entropy(a @ b.T * net.scale, torch.arange(len(a)))


SIDES = [table, table_of_inputs, statistic, layer_on_the_mean, parts, own_loss]


def of_the_towers(outputs: dict[str, Any], targets: Any) -> Tensor:
    return (outputs["a"] * outputs["b"]).sum(1).sin()


def of_the_side_output(outputs: dict[str, Any], targets: Any) -> Tensor:
    side = outputs["side"]
    side = sum(part.sum() for part in side) if isinstance(side, list | tuple) else side
    return of_the_towers(outputs, targets) + (side.sum(1) if side.dim() == 2 and len(side) == 4 else side.sum())


def problem(side: Side) -> tuple[TwoTowers, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return TwoTowers(side).double(), (torch.randn(4, 4).double(), torch.randn(4, 5).double())


@pytest.mark.parametrize("check", ["never", "first"])
@pytest.mark.parametrize("side", SIDES)
def test_exact_where_no_gradient_comes_back(side: Side, check: Any, per_sample_truth: Any) -> None:
    model, inputs = problem(side)
    truth = per_sample_truth(model, of_the_towers, inputs, None).gradients
    source = persample.make_source("fused", model, of_the_towers, check=check)
    torch.testing.assert_close(source.per_sample(inputs, None), truth, rtol=1e-9, atol=1e-12)
    squares = {name: g.square().mean(0) for name, g in truth.items()}
    torch.testing.assert_close(dict(source.moments(inputs, None).second_moment), squares, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("side", SIDES)
def test_refused_where_the_losses_depend_on_it(side: Side) -> None:
    model, inputs = problem(side)
    source = persample.make_source("fused", model, of_the_side_output, check="never")
    with pytest.raises(UnsupportedModelError, match="an entry of its result from"):
        source.moments(inputs, None)


@pytest.mark.parametrize("side", SIDES)
def test_refused_in_the_users_own_backward_pass(side: Side) -> None:
    model, inputs = problem(side)
    source = persample.make_source("fused", model, of_the_towers, check="never")
    with pytest.raises(UnsupportedModelError, match="an entry of its result from"), source.recording():
        of_the_side_output(model(*inputs), None).mean().backward()


@pytest.mark.parametrize(("loss_fn", "served"), [(of_the_towers, True), (of_the_side_output, False)])
def test_explain_refuses_only_what_the_losses_depend_on(loss_fn: Any, served: bool) -> None:
    model, inputs = problem(statistic)
    assert persample.explain(model, inputs, None, loss_fn, backend="fused").supported == served


class Frames(nn.Module):
    """Reads what a layer makes of a class token, the same for all, from rows of frames that belong to other samples."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.inner, self.out = nn.Parameter(torch.randn(1, 1, 4)), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, t, n, c = x.shape
        h = self.inner(torch.cat([self.token.expand(b * t, 1, c), x.reshape(b * t, n, c)], 1))
        return self.out(torch.cat([h[:b, :1], h[:, 1:].reshape(b, t * n, c)], 1))


def test_equal_entries_of_other_samples_are_refused_as_such() -> None:
    torch.manual_seed(0)
    model, x = Frames().double(), torch.randn(3, 2, 4, 4).double()

    def loss_fn(outputs: Tensor, targets: Any) -> Tensor:
        return outputs.flatten(1).sin().sum(1)

    with pytest.raises(UnsupportedModelError, match=r"same for all samples.*'vmap', 'vjp' or 'loop'"):
        persample.make_source("fused", model, loss_fn, check="never").moments(x, None)
    losses = torch.stack([loss_fn(model(x[i : i + 1]), None)[0] for i in range(3)])
    for backend in ("vmap", "vjp", "loop"):
        found = persample.make_source(backend, model, loss_fn).moments(x, None)
        torch.testing.assert_close(found.losses, losses)
