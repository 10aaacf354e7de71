"""Every built-in backend passes the suite, and what it refuses is what the documentation says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from persample.testing import BackendSuite, Case, Verdict, support
from persample.testing.devices import on_cuda

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
DOCUMENTED = support.read(PAGE.read_text(encoding="utf-8"))


MASKS = "draws other masks than an ordinary pass"
OTHERWISE_ON_CUDA = {
    "Dropout in training mode": MASKS,
    "Functional dropout": MASKS,
    "Spatial transformer": "cannot run the kernel of this layer",
}


class DocumentedSuite(BackendSuite):
    def accept(self, case: Case, verdict: Verdict) -> None:
        super().accept(case, verdict)
        documented = DOCUMENTED.get((case.name, self.backend))
        if torch.__version__ < "2.13" and verdict.kind == "refused":
            return  # what torch.func of an older PyTorch cannot run
        assert verdict.kind == documented, f"run `make support`: {verdict}"


class TestLoop(DocumentedSuite):
    backend = "loop"
    serves = "everything"


class TestFused(DocumentedSuite):
    backend = "fused"
    serves = "everything"


class TestVmap(DocumentedSuite):
    backend = "vmap"
    options = {"randomness": "same"}  # noqa: RUF012 - declared as a class variable in the suite
    stream = "each"
    serves = "layers"

    @pytest.fixture(autouse=True)
    def _otherwise_on_cuda(self, request: pytest.FixtureRequest) -> None:
        case = getattr(request.node, "callspec", None) and request.node.callspec.params.get("case")
        if on_cuda() and case and case.name in OTHERWISE_ON_CUDA:
            pytest.skip(f"on a GPU torch.func {OTHERWISE_ON_CUDA[case.name]}")


class TestVjp(BackendSuite):
    backend = "vjp"
    serves = "everything"


class TestHooks(DocumentedSuite):
    backend = "hooks"
    serves = "layers"


class TestOpacus(DocumentedSuite):
    backend = "opacus"


class TestOpacusModule(BackendSuite):
    backend = "opacus (module)"


class TestOpacusRules(BackendSuite):
    backend = "opacus (rules)"


class TestBackpack(DocumentedSuite):
    backend = "backpack"


class TestBackpackExtend(BackendSuite):
    backend = "backpack (extend)"


class TestBackpackRules(BackendSuite):
    backend = "backpack (rules)"


def test_the_page_has_every_case_and_no_other() -> None:
    assert list(DOCUMENTED) == [(name, c.backend) for name in support.ZOO for c in support.BUILT_IN]


@pytest.mark.parametrize("candidate", support.BUILT_IN, ids=lambda c: c.backend)
def test_the_page_is_made_with_the_options_of_the_tests(candidate: support.Candidate) -> None:
    suites = {suite.backend: suite() for suite in DocumentedSuite.__subclasses__()}
    assert suites[candidate.backend].candidate == candidate
