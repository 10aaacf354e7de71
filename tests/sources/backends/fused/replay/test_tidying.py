"""Operations that need not be run are left out of a recorded step, and its results stay what they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from persample.sources.backends.fused.replay.tidying import tidy

aten = torch.ops.aten


def names_after(function: Callable[..., Sequence[Tensor]], *operands: Tensor) -> list[str]:
    """Return the operations that are left, after comparing results, operands and random numbers with the function's."""
    own, others = [t.clone() for t in operands], [t.clone() for t in operands]
    recorded = make_fx(function, tracing_mode="fake")(*operands)
    tidy(recorded)
    torch.manual_seed(0)
    expected = function(*own)
    torch.manual_seed(0)
    found = recorded(*others)
    for a, b in zip((*expected, *own), (*found, *others), strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
    assert len({*map(id, found), *map(id, others)}) == len(found) + len(others), "each result is a tensor of its own"
    names = [node.target.__name__ for node in recorded.graph.nodes if hasattr(node.target, "_schema")]
    return [name.replace("alias", "detach") for name in names]  # PyTorch 2.14 records the former for the latter


def test_names_of_the_same_tensor_and_what_nobody_takes_are_left_out() -> None:
    def step(x: Tensor) -> list[Tensor]:
        y = x.sin()
        aten.zeros.default([])
        z = aten.view.default(aten.detach.default(y), [3, 4]).expand(3, 4)
        return [z.cos()]

    assert names_after(step, torch.randn(3, 4)) == ["sin.default", "cos.default"]


def test_other_shapes_and_strides_stay() -> None:
    def step(x: Tensor) -> list[Tensor]:
        y = x.sin()
        return [y.view(4, 3).cos(), y.t().t().expand(2, 3, 4).cos()]

    kept = names_after(step, torch.randn(3, 4))
    assert {"view.default", "expand.default"} <= {*kept}


def test_each_result_is_a_tensor_of_its_own() -> None:
    def step(x: Tensor) -> list[Tensor]:
        y = x.sin()
        return [y.detach(), y.detach(), x.detach(), y]

    assert names_after(step, torch.randn(3)).count("detach.default") == 3


def test_what_a_parameter_is_seen_as_stays() -> None:
    assert names_after(lambda x: [x.detach().cos()], torch.randn(3)) == ["detach.default", "cos.default"]


def test_assertions_stay() -> None:
    def step(x: Tensor) -> list[Tensor]:
        torch._assert_async((x > -9).all())
        return [x.sin()]

    assert any(name.startswith("_assert_async") for name in names_after(step, torch.randn(3)))


def test_writing_and_random_numbers_stay() -> None:
    def step(x: Tensor) -> list[Tensor]:
        y = x.sin()
        z = y.detach()
        z.add_(1)
        torch.rand(2)
        x.detach().mul_(2)
        return [y.detach().cos(), torch.rand(3)]

    kept = names_after(step, torch.randn(3))
    assert kept.count("rand.default") == 2
    assert {"add_.Tensor", "mul_.Tensor"} <= {*kept}
    assert kept.count("detach.default") == 1  # of the operand


@pytest.mark.parametrize("change", [lambda z: z.t_(), lambda z: z.squeeze_(0), lambda z: z.unsqueeze_(0)])
def test_nothing_is_left_out_where_the_shape_of_a_tensor_changes(change: Callable[[Tensor], Any]) -> None:
    def step(x: Tensor) -> list[Tensor]:
        y = x.sin()
        z = y.detach()
        change(z)
        return [y.cos(), z.cos()]

    assert "detach.default" in names_after(step, torch.randn(1, 3))
