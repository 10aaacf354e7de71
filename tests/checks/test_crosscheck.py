"""`crosscheck`: a backend agrees, is wrong by so much, or says why it refuses; the others go on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import persample
from persample.errors import UnsupportedModelError, UsageError
from persample.moments import Moments
from persample.quantities import Gram, Norms, Projection, WeightedSum, clipping
from persample.quantities.block import Formed
from persample.sources import Batch, LoopSource, registry
from persample.sources.contract import Receive


class Doubled(LoopSource):
    """Twice the second moment."""

    def compute_moments(self, batch: Batch) -> Moments:
        moments = super().compute_moments(batch)
        return Moments(moments.losses, moments.mean, {name: 2 * s for name, s in moments.second_moment.items()})


@pytest.fixture(autouse=True)
def doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    persample.register_backend("doubled", f"{__name__}:Doubled")


def problem() -> tuple[nn.Module, Any, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    return model, persample.losses.cross_entropy, torch.randn(6, 4), torch.randint(2, (6,))


def test_exact_backends_agree_to_rounding() -> None:
    for agreement in persample.crosscheck(*problem(), backends=["loop", "hooks", "fused", "vmap", "vjp"]):
        assert agreement.agrees, agreement
        assert agreement.problem is None
        assert max(agreement.mean or 0, agreement.second_moment or 0, agreement.per_sample or 0) < 1e-5


def test_a_wrong_backend_is_told_by_how_much_it_is_wrong() -> None:
    wrong, right = persample.crosscheck(*problem(), backends=["doubled", "loop"])
    assert not wrong.agrees
    assert right.agrees
    assert wrong.second_moment == pytest.approx(math.sqrt(2) - 1, rel=1e-4)  # as root mean squares
    assert max(wrong.mean or 0, wrong.per_sample or 0) < 1e-5


class WithoutCrossTerms(LoopSource):
    """Norms of blocks of its own that are too large for one sample."""

    def compute_blocks(self, batch: Batch, receive: Receive, max_bytes: int) -> Tensor:
        losses, gradients = self.compute_per_sample(batch)
        for name, g in gradients.items():
            receive(_TooLong(name, 0, len(g), g))
        return losses


class _TooLong(Formed):
    def compute_squared_norms(self) -> Tensor:
        squares = super().compute_squared_norms()
        squares[-1] *= 1.21
        return squares


def test_quantities_are_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    persample.register_backend("long", f"{__name__}:WithoutCrossTerms")
    asked = [Norms(), Norms(per="parameter", name="each"), WeightedSum(clipping(0.1)), Gram(), Projection(4)]
    wrong, *right = persample.crosscheck(*problem(), backends=["long", "loop", "hooks", "fused"], quantities=asked)
    assert not wrong.agrees
    assert max(wrong.mean or 0, wrong.second_moment or 0, wrong.per_sample or 0) < 1e-5
    assert wrong.quantities is not None
    assert 0.01 < wrong.quantities <= 0.1 + 1e-6
    for agreement in right:
        assert agreement.agrees, agreement
        assert agreement.quantities is not None
        assert agreement.quantities < 1e-5
    (agreement,) = persample.crosscheck(*problem(), backends=["fused"])
    assert agreement.quantities is None
    with pytest.raises(persample.errors.OptionError, match="no quantity"):
        persample.crosscheck(*problem(), backends=["fused"], quantities=[Norms])  # type: ignore[list-item]


def test_a_refusal_is_told_and_the_others_go_on() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 2))
    arguments = model, persample.losses.cross_entropy, torch.randn(5, 3), torch.randint(2, (5,))
    refused, served = persample.crosscheck(*arguments, backends=["hooks", "fused"])
    assert (refused.mean, refused.second_moment, refused.per_sample) == (None, None, None)
    assert not refused.agrees
    assert "PReLU" in str(refused.problem)
    assert served.agrees


def test_what_has_no_per_sample_gradient_is_refused_as_a_whole() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with pytest.raises(UnsupportedModelError, match="BatchNorm1d"):
        persample.crosscheck(model, persample.losses.cross_entropy, torch.randn(5, 3), torch.randint(2, (5,)))


def test_an_approximation_is_not_compared_as_if_it_were_exact() -> None:
    with pytest.raises(UsageError, match="approximate second moment"):
        persample.crosscheck(*problem(), backends=["hooks"], options={"hooks": {"curvature": "printed"}})


def test_model_and_random_numbers_are_as_before() -> None:
    model, *others = problem()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    persample.crosscheck(model, *others, backends=["fused", "doubled"])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
