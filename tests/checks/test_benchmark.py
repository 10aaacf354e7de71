"""`benchmark`: what each backend costs, in units of an ordinary pass; a wrong one is not timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import persample
from persample.checks.benchmark import _cost
from persample.moments import Moments
from persample.quantities import Norms, Setting
from persample.sources import Batch, LoopSource, registry


class Doubled(LoopSource):
    """Twice the mean gradient."""

    def compute_moments(self, batch: Batch) -> Moments:
        moments = super().compute_moments(batch)
        return Moments(moments.losses, {name: 2 * g for name, g in moments.mean.items()}, moments.second_moment)


@pytest.fixture(autouse=True)
def doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    persample.register_backend("doubled", f"{__name__}:Doubled")


def test_right_backends_are_timed_and_others_are_told() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.PReLU(), nn.Linear(3, 2))
    x, y = torch.randn(6, 4), torch.randint(2, (6,))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    backends = ["fused", "hooks", "doubled", "vmap"]
    plain, fused, hooks, doubled, vmap = persample.benchmark(
        model, persample.losses.cross_entropy, x, y, backends=backends, rounds=2
    )
    assert (plain.backend, plain.time_ratio, plain.memory_ratio) == ("plain", 1.0, 1.0)
    for served in (fused, vmap):
        assert served.problem is None
        assert served.time_ratio is not None
        assert served.time_ratio > 0
    for refused, reason in ((hooks, "PReLU"), (doubled, "disagrees with the oracle")):
        assert refused.time_ratio is None
        assert reason in str(refused.problem)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_quartiles_of_few_rounds_lie_between_the_ratios() -> None:
    cost = _cost("fused", {"plain": [1.0, 1.0], "fused": [1.0, 9.0]}, {"plain": 1, "fused": 1})
    assert (cost.time_ratio_low, cost.time_ratio, cost.time_ratio_high) == (3.0, 5.0, 7.0)


def test_quantities_are_timed_in_place_of_moments() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    asked: list[str] = []

    class Counted(Norms):
        def begin(self, setting: Setting) -> Any:
            asked.append(self.name)
            return super().begin(setting)

    x, y = torch.randn(6, 4), torch.randint(2, (6,))
    plain, fused, hooks = persample.benchmark(
        model, persample.losses.cross_entropy, x, y, backends=["fused", "hooks"], rounds=2, quantities=[Counted()]
    )
    assert plain.time_ratio == 1.0
    assert fused.time_ratio is not None
    assert hooks.time_ratio is not None
    assert len(asked) > 2 * 2 * 3  # two backends, three rounds with the first, two calls in each


class Branching(nn.Linear):
    """A step that cannot be recorded."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if bool(self.weight.detach().sum() > 0) else -x)


@pytest.mark.parametrize("options", [{}, {"fused": {"compile": False}}], ids=["default", "without recording"])
def test_fused_is_timed_as_it_runs_after_some_calls(options: Any, caplog: pytest.LogCaptureFixture) -> None:
    x, y = torch.randn(6, 4), torch.randint(2, (6,))
    loss_fn = persample.losses.cross_entropy
    persample.benchmark(Branching(4, 2), loss_fn, x, y, backends=["fused"], options=options, rounds=1)
    told = [record for record in caplog.records if "does not replay" in record.message]
    assert bool(told) == (not options)
