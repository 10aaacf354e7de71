"""The backend `fused` passes the suite with recorded steps: what is judged are steps recorded on other numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import settings
from torch import Tensor

import persample
from persample.quantities import WeightedSum
from persample.sources.backends.fused.replay import replay
from persample.sources.batch import as_batch
from persample.sources.contract import Check
from persample.sources.model.state import State, state_restored
from persample.sources.splits.tree import tensors_in
from persample.testing import ZOO, BackendSuite, Candidate, Case, Problem
from persample.testing.candidate import Method, asked

# Each case is compiled, so `make test` has few of them, and `make conformance` all.
THOROUGH = settings().max_examples >= 1000
CASES = list(ZOO.values())[:: 1 if THOROUGH else 12]


class RecordedBefore(Candidate):
    """The backend after the same call on other numbers, so that one that was recorded as a constant shows."""

    def call(self, source: persample.PerSampleGradSource, problem: Problem, method: Method) -> Any:
        """As ever, but for weights that are no function, of which nobody knows whether it changes."""
        if method != "quantities":
            return super().call(source, problem, method)
        size = as_batch(problem.inputs, problem.targets, problem.model).size
        quantities = [q for q in asked() if not isinstance(q, WeightedSum)]
        weights = WeightedSum(torch.linspace(-1, 2, size, dtype=torch.float64))
        return source.compute(problem.inputs, problem.targets, *quantities, weights)

    def ready(self, problem: Problem, method: Method, check: Check) -> persample.PerSampleGradSource:
        source = self.source(problem, check)
        # An error comes again, or is one of the other numbers.
        with other_numbers(problem), problem.autocasting(), contextlib.suppress(Exception):
            self.call(source, problem, method)
        return source


@contextmanager
def other_numbers(problem: Problem) -> Iterator[None]:
    """Let parameters and batch have other values inside the context, and the model its state again afterwards."""
    tensors = [t for t in tensors_in((problem.inputs, problem.targets)) if t.layout is torch.strided]
    tensors += problem.model.parameters()
    kept = [t.detach().clone() for t in tensors]
    with state_restored(State(problem.model)):
        for t in tensors:
            change(t)
        yield
        for t, values in zip(tensors, kept, strict=True):
            if not torch.equal(t.detach().nan_to_num(), values.nan_to_num()):
                t.data.copy_(values)


def change(tensor: Tensor) -> None:
    """Give a tensor other values of the same kind."""
    expanded = any(stride == 0 for stride in tensor.stride())
    if expanded:
        return
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.data.mul_(1.25)
    elif tensor.dim() > 0:
        tensor.data.copy_(tensor.roll(1, 0))


class TestFusedCompiled(BackendSuite):
    backend = "fused"
    serves = "everything"
    options: ClassVar = {"compile": True}
    one_in = 1 if THOROUGH else 4

    @property
    def candidate(self) -> Candidate:
        return RecordedBefore(self.backend, self.options, self.stream)

    @pytest.fixture(autouse=True)
    @staticmethod
    def _forgotten() -> Iterator[None]:
        """Let Dynamo forget what it has compiled."""
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_zoo(self, case: Case) -> None:
        super().test_zoo(case)


class TestFusedByDefault(TestFusedCompiled):
    """What is recorded without being asked for, here at the first call."""

    options: ClassVar = {}
    one_in = 1 if THOROUGH else 12

    @pytest.fixture(autouse=True)
    @staticmethod
    def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(replay, "_CALLS", 0)
        monkeypatch.setattr(replay, "_SECONDS", 0.0)

    @pytest.mark.parametrize("case", CASES[:: 1 if THOROUGH else 3], ids=lambda case: case.name)
    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_zoo(self, case: Case) -> None:
        super().test_zoo(case)
