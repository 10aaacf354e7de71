"""Where rounding decides what gets the gradient: the self-check and the cross-check look again in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import persample
from persample.errors import DisagreementError
from persample.moments import Moments
from persample.sources import Batch
from persample.sources.backends.loop import LoopSource


class NearTie(nn.Module):
    """The larger of two units, equal for sample 0 but for rounding, which is another one in a batch in float32."""

    def __init__(self, smooth: float = 0.0) -> None:
        super().__init__()
        self.smooth = smooth  # so much of the sum of both is added
        self.units = nn.Linear(3, 2)
        with torch.no_grad():
            self.units.weight[1] = self.units.weight[0] + torch.tensor([0.0, 0.0, 1.0])
            self.units.bias.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Return the larger unit of each sample."""
        first, second = self.units(x).unbind(1)
        if x.dtype == torch.float32 and len(x) > 1:
            second = second + 1e-6
        return torch.where(second > first, second, first) + self.smooth * (first + second)


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    inputs = torch.randn(128, 3)
    inputs[0, 2] = 0.0
    return NearTie(), inputs, torch.ones(128)


def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs * targets


def test_both_sides_of_a_tie_are_right() -> None:
    model, inputs, targets = problem()
    alone = persample.make_source("loop", model, loss_fn, check="never").moments(inputs, targets).mean["units.bias"]
    model.zero_grad()
    loss_fn(model(inputs), targets).mean().backward()
    moved = (alone - model.get_parameter("units.bias").grad).abs()
    assert (moved > 5e-3).all()  # far beyond rounding: the two do differ
    for check in ("first", "always"):
        found = persample.make_source("loop", model, loss_fn, check=check).moments(inputs, targets)
        torch.testing.assert_close(found.mean["units.bias"], alone)
    persample.make_source("loop", model, loss_fn).per_sample(inputs, targets)


def test_crosscheck_looks_again_in_float64() -> None:
    _, inputs, targets = problem()
    model = NearTie(smooth=25.0)
    fused, loop = persample.crosscheck(model, loss_fn, inputs, targets, backends=["fused", "loop"])
    assert fused.mean is not None
    assert fused.mean > fused.allowed
    assert fused.agrees
    assert fused.in_float64 is not None
    assert fused.in_float64 < 1e-9
    assert loop.agrees
    assert loop.in_float64 is None


class Off(LoopSource):
    """The loop, with a mean that is off by a part."""

    part = 0.02
    dtypes = (torch.float32, torch.float64)

    def compute_moments(self, batch: Batch) -> Moments:
        moments = super().compute_moments(batch)
        mean = {name: g * (1 + self.part) if g.dtype in self.dtypes else g for name, g in moments.mean.items()}
        return Moments(moments.losses, mean, moments.second_moment)


@pytest.mark.parametrize(("part", "dtypes"), [(0.02, Off.dtypes), (0.5, (torch.float32,)), (float("nan"), Off.dtypes)])
def test_what_is_wrong_is_no_rounding(part: float, dtypes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Off, "part", part)
    monkeypatch.setattr(Off, "dtypes", dtypes)
    model, inputs, targets = problem()
    with pytest.raises(DisagreementError, match=r"mean gradient of 'units\.weight'"):
        Off(model, loss_fn).moments(inputs, targets)


def test_a_model_that_does_not_run_in_float64_gets_no_second_look() -> None:
    class Single(NearTie):
        def forward(self, x: Tensor) -> Tensor:
            """Return the same, by a product that takes float32 alone."""
            return super().forward(x @ torch.eye(3))

    _, inputs, targets = problem()
    with pytest.raises(DisagreementError, match="LoopSource is wrong on this model"):
        persample.make_source("loop", Single(), loss_fn).moments(inputs, targets)
