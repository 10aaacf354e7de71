"""The suite finds what it looks for: wrong numbers, refusals of what must be served, errors that give no advice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import persample
from persample.errors import UnsupportedModelError
from persample.sources import registry
from persample.sources.backends.hooks import HooksSource
from persample.sources.backends.loop import LoopSource
from persample.testing import ZOO, BackendSuite, Candidate, Problem


class PrintedFormula(HooksSource):
    """Squares before the sum over the positions of a convolution."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any, Any], Any], *, check: Any = "first") -> None:
        super().__init__(model, loss_fn, curvature="printed", check=check)


class Scaled(LoopSource):
    """Off by the batch size."""

    def compute_per_sample(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        losses, gradients = super().compute_per_sample(batch)
        return losses, {name: g / batch.size for name, g in gradients.items()}


class SlightlyOff(LoopSource):
    """Off by less than the self-check can see, and by more than rounding explains."""

    def compute_moments(self, batch: Any) -> Any:
        moments = super().compute_moments(batch)
        return dataclasses.replace(moments, mean={n: g * (1 + 3e-8) for n, g in moments.mean.items()})


class Zeros(LoopSource):
    """Returns zeros."""

    def compute_per_sample(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        losses, gradients = super().compute_per_sample(batch)
        return losses, {name: torch.zeros_like(g) for name, g in gradients.items()}


class Twice(LoopSource):
    """Returns gradients twice as large."""

    def compute_per_sample(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        losses, gradients = super().compute_per_sample(batch)
        return losses, {name: 2 * g for name, g in gradients.items()}


class OtherOrder(LoopSource):
    """Right numbers in another order."""

    def compute_per_sample(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        losses, gradients = super().compute_per_sample(batch)
        return losses, dict(reversed(gradients.items()))


class Curt(LoopSource):
    """Serves nothing, and says nothing of what to do."""

    def refuse_unsupported(self) -> None:
        raise UnsupportedModelError("Not today.")


class Polite(LoopSource):
    """Serves nothing, and says what to do."""

    def refuse_unsupported(self) -> None:
        raise UnsupportedModelError("Not today: use another backend.")


class Drawing(LoopSource):
    """Draws random numbers for itself."""

    def compute_moments(self, batch: Any) -> Any:
        torch.rand(1)
        return super().compute_moments(batch)


class Overlooking(LoopSource):
    """Answers where the samples are mixed, with the gradients of a loss that is not the user's."""

    def losses(self, batch: Any, model: Any = None) -> Tensor:
        return torch.cat([super(Overlooking, self).losses(batch.take([i]), model) for i in range(batch.size)])


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Callable[[type], Candidate]:
    """A candidate of a source class, registered for one test."""

    def register(source: type) -> Candidate:
        monkeypatch.setattr(registry, "_load", lambda backend: source)
        monkeypatch.setattr(registry, "_registered", dict(registry._registered))
        persample.register_backend("own", "own:Source")
        return Candidate("own")

    return register


@pytest.mark.parametrize(
    ("source", "name", "check"),
    [
        (PrintedFormula, "Conv2d", "never"),
        (PrintedFormula, "Linear on a sequence", "never"),
        (Scaled, "MLP", "never"),
        (SlightlyOff, "MLP", "first"),
        (OtherOrder, "MLP", "first"),
        (Curt, "MLP", "first"),
        (Drawing, "MLP", "first"),
        (Overlooking, "Mean over the batch", "never"),
    ],
)
def test_finds_what_is_wrong(source: type, name: str, check: Any, own: Callable[[type], Candidate]) -> None:
    with pytest.raises(AssertionError):
        own(source).judge(ZOO[name].problem(3), check)


class Saturated(nn.Module):
    """Sigmoids of large numbers, of which next to no gradient is left."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return numbers close to one, which hardly depend on the parameters."""
        return 1 + torch.sigmoid(self.inner(x) - 30)


@pytest.mark.parametrize("check", ["never", "first"])
@pytest.mark.parametrize("source", [Zeros, Twice])
def test_small_gradients_are_not_taken_for_rounding(source: type, check: Any, own: Callable[[type], Candidate]) -> None:
    torch.manual_seed(0)
    model = Saturated().double()
    problem = Problem(model, torch.randn(4, 3).double(), torch.randn(4, 4).double(), persample.losses.gaussian)
    assert 0 < max(g.abs().max() for g in problem.truth().gradients.values()) < 1e-11
    assert Candidate("fused").judge(problem).kind == "exact"
    if check == "first":
        assert own(source).judge(problem, check).kind == "caught"
    else:
        with pytest.raises(AssertionError):
            own(source).judge(problem, check)


@pytest.mark.parametrize(("source", "kind"), [(LoopSource, "exact"), (Polite, "refused"), (Scaled, "caught")])
def test_says_what_it_found(source: type, kind: str, own: Callable[[type], Candidate]) -> None:
    assert own(source).judge(ZOO["MLP"].problem(3)).kind == kind


@pytest.mark.parametrize("serves", ["everything", "nothing"])
def test_what_must_be_served_may_not_be_refused(serves: Any, own: Callable[[type], Candidate]) -> None:
    own(Polite)
    suite = type("TestOwn", (BackendSuite,), {"backend": "own", "serves": serves})()
    if serves == "nothing":
        suite.test_zoo(ZOO["MLP"])
    else:
        with pytest.raises(AssertionError, match="must not refuse"):
            suite.test_zoo(ZOO["MLP"])
