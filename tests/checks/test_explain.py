"""`explain`: what it says is served is served, what it says is refused is refused, and nothing of it remains."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import persample
from persample.checks import Explanation
from persample.errors import BatchError, DisagreementError, LossError, OptionError, UnsupportedModelError
from persample.sources import registry
from persample.sources.backends.loop import LoopSource
from persample.testing import ZOO, support
from persample.testing.problem import Problem
from persample.testing.zoo.case import Net, parameter


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def statuses(explanation: Explanation) -> dict[str, str]:
    return {row.name: row.status for row in explanation.rows}


def hows(explanation: Explanation) -> dict[str, str]:
    return {row.name: row.how for row in explanation.rows}


# It is true.

#: All cases for the backends that tell every use, a part of them for those that try two samples.
EVERY = {"fused": 1, "hooks": 1}
ASKED = [
    pytest.param(candidate, name, id=f"{candidate.backend}-{name}")
    for candidate in support.BUILT_IN
    for name in list(ZOO)[:: EVERY.get(candidate.backend, 5)]
]


@pytest.mark.parametrize(("candidate", "name"), ASKED)
@pytest.mark.filterwarnings("ignore")
def test_it_is_true(candidate: support.Candidate, name: str, no_trace: Any) -> None:
    case = ZOO[name]
    problem = case.problem(case.sizes[-1])
    backend = candidate.backend
    with problem.autocasting(), no_trace(problem.model, problem.inputs, problem.targets):
        told = persample.explain(
            problem.model, problem.inputs, problem.targets, problem.loss_fn, backend=backend, **candidate.options
        )
        seen = persample.explain(problem.model, loss_fn=problem.loss_fn, backend=backend, **candidate.options)
    torch.manual_seed(problem.seed)
    moments, refusal = answer(candidate.source(problem), problem)
    if moments is None:
        assert told.supported is False or isinstance(refusal, DisagreementError), refusal
        return
    assert told.supported is True, str(told)
    assert seen.supported is None, str(seen)
    assert set(statuses(told).values()) <= {"served", "unused", "frozen"}
    for row in told.rows:
        assert (row.name in moments.mean) == (row.status != "frozen")
        if row.status == "unused":
            assert not moments.second_moment[row.name].any()


def answer(source: Any, problem: Problem) -> tuple[persample.Moments | None, Exception | None]:
    """The moments, or the refusal; a backend that is wrong, which the self-check tells, does not know it."""
    try:
        with problem.autocasting():
            return source.moments(problem.inputs, problem.targets), None
    except (UnsupportedModelError, DisagreementError) as refusal:
        return None, refusal


@pytest.mark.parametrize("name", list(ZOO)[::7])
@pytest.mark.filterwarnings("ignore")
def test_the_parameters_that_are_refused_are_those_that_are_named(name: str) -> None:
    problem = ZOO[name].problem(ZOO[name].sizes[-1])
    source = persample.make_source("hooks", problem.model, problem.loss_fn)
    told = persample.explain(problem.model, problem.inputs, problem.targets, problem.loss_fn, backend="hooks")
    _, refusal = answer(source, problem)
    if isinstance(refusal, UnsupportedModelError):
        assert str(refusal) in [*told.refusals, *(use.why for row in told.rows for use in row.uses)]


# What it tells.


class Several(nn.Module):
    """A parameter of every status."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.centres = nn.Parameter(torch.randn(3, 4))
        self.unused = nn.Linear(2, 2)
        self.blocks[0].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        for _ in range(2):
            for block in self.blocks:
                h = block(h).tanh()
        self.unused(h[:, 0, :2])
        return self.head(h) + torch.cdist(h, self.centres).sum(-1, keepdim=True)


TOKENS = torch.arange(12).reshape(3, 4) % 5


def test_every_parameter_and_every_use() -> None:
    told = persample.explain(Several(), TOKENS, backend="fused")
    assert told.supported is True
    assert told.samples == 3
    assert statuses(told) == {
        "centres": "served",
        "embedding.weight": "served",
        "blocks.0.weight": "served",
        "blocks.0.bias": "frozen",
        "blocks.1.weight": "served",
        "blocks.1.bias": "served",
        "unused.weight": "unused",
        "unused.bias": "unused",
    }
    by = hows(told)
    assert by["centres"] == "cdist (fallback)"
    assert by["embedding.weight"] == "embedding in 'embedding'; linear in 'head'"
    assert by["blocks.0.weight"] == "linear in 'blocks.0' ×2"
    assert by["blocks.0.bias"] == by["unused.weight"] == ""
    rows = {row.name: row for row in told.rows}
    assert rows["embedding.weight"].other_names == ("head.weight",)
    assert rows["embedding.weight"].shape == (5, 4)
    assert rows["embedding.weight"].module == "Embedding 'embedding'"
    assert rows["centres"].module == "The model (Several)"


def test_the_backends_that_go_by_layers_tell_what_they_miss() -> None:
    told = persample.explain(Several(), TOKENS, backend="hooks")
    assert told.supported is False
    assert not told.refusals
    rows = {row.name: row for row in told.rows}
    assert rows["centres"].status == "refused"
    assert "has parameters of its own, and backend 'hooks' has no rule for it" in rows["centres"].why
    assert rows["embedding.weight"].status == "served"
    assert rows["embedding.weight"].how == "Embedding in 'embedding'; Linear in 'head'"
    assert rows["blocks.1.bias"].how == "Linear in 'blocks.1' ×2"
    assert rows["unused.weight"].status == "unused"


@pytest.mark.parametrize("backend", ["hooks", "opacus", "backpack"])
def test_uses_past_the_calls_of_layers(backend: str) -> None:
    model = Net(lambda m, x: F.linear(m.first(x), m.second.weight), first=nn.Linear(3, 3), second=nn.Linear(3, 3))
    told = persample.explain(model, torch.randn(4, 3), backend=backend)
    assert statuses(told) == {
        "first.weight": "served",
        "first.bias": "served",
        "second.weight": "refused",
        "second.bias": "unused",
    }
    assert "outside the call of a module" in {row.name: row for row in told.rows}["second.weight"].why


def test_a_layer_that_is_called_in_another_layout() -> None:
    model = Net(lambda m, x: m.inner(x.transpose(0, 1)).transpose(0, 1), inner=nn.Linear(3, 3))
    told = persample.explain(model, torch.randn(4, 5, 3), backend="hooks")
    assert set(statuses(told).values()) == {"refused"}
    assert "dim 0" in told.rows[0].why
    assert persample.explain(model, torch.randn(4, 5, 3), backend="fused").supported


def test_parameters_computed_from_others() -> None:
    model = parametrizations.weight_norm(nn.Linear(3, 2))
    told = persample.explain(model, torch.randn(4, 3), backend="fused")
    assert set(hows(told).values()) == {"linear"}
    assert len(told.rows) == 3


def test_it_goes_on_after_a_refusal() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = x.clone()
        first = m.first(h)
        h.mul_(2)  # what the first layer saw is lost
        weight = m.second.weight * 1
        alias = weight.detach()
        weight.mul_(2)  # changes a constant, too
        return m.third(first + h @ (weight + alias))

    model = Net(forward, first=nn.Linear(3, 3), second=nn.Linear(3, 3, bias=False), third=nn.Linear(3, 2))
    told = persample.explain(model, torch.randn(4, 3), backend="fused")
    assert statuses(told) == {
        "first.weight": "refused",
        "first.bias": "refused",
        "second.weight": "refused",
        "third.weight": "served",
        "third.bias": "served",
    }
    reasons = {row.name: row.why for row in told.rows}
    assert "changed in place after the operation" in reasons["first.weight"]
    assert reasons["second.weight"] != reasons["first.weight"]


def test_without_a_batch_nothing_is_promised(backend: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).requires_grad_(False))
    told = persample.explain(model, backend=backend)
    assert told.supported is None
    assert statuses(told) == {"0.weight": "depends", "0.bias": "depends", "1.weight": "frozen", "1.bias": "frozen"}
    assert all(told.rows[n].how for n in (0, 1))
    assert "pass an example batch" in str(told)


# The model as a whole.


@pytest.mark.parametrize("inputs", [None, torch.randn(4, 3)], ids=["no batch", "batch"])
def test_a_module_that_mixes_the_samples(backend: str, inputs: Any, no_trace: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))
    with no_trace(model):
        told = persample.explain(model, inputs, backend=backend)
    assert told.supported is False
    assert [reason.split()[1] for reason in told.refusals] == ["'1'", "'2'"]
    assert all("persample.fix" in reason for reason in told.refusals)
    assert statuses(told)["1.weight"] == "refused"
    assert statuses(told)["0.weight"] == "depends"
    assert persample.explain(model.eval(), inputs, backend="hooks").supported is (None if inputs is None else True)


@pytest.mark.parametrize("module", [nn.LazyLinear(3), nn.Linear(3, 3, dtype=torch.complex64)])
def test_parameters_that_have_no_gradient_to_square(backend: str, module: nn.Module) -> None:
    told = persample.explain(nn.Sequential(module), backend=backend)
    assert told.supported is False
    assert statuses(told)["0.weight"] == "refused"
    assert str(told)


@pytest.mark.parametrize("function", [lambda m, x: m.inner(x) - m.inner(x).mean(0), lambda m, x: m.inner(x).softmax(0)])
def test_models_that_mix_the_samples(backend: str, function: Any) -> None:
    told = persample.explain(Net(function, inner=nn.Linear(3, 3)), torch.randn(4, 3), backend=backend)
    assert told.supported is False
    assert told.refusals


def test_reentrant_checkpointing(backend: str) -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.head(checkpoint(m.inner, m.first(x).detach().requires_grad_(), use_reentrant=True))

    model = Net(forward, first=nn.Linear(3, 3), inner=nn.Linear(3, 3), head=nn.Linear(3, 2))
    told = persample.explain(model, torch.randn(4, 3), backend=backend)
    assert told.supported is False
    assert "use_reentrant=False" in told.refusals[0] or backend == "vmap"


def test_a_model_that_rewrites_its_parameters(backend: str, no_trace: Any) -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            m.inner.weight.mul_(0.9)
        return m.inner(x)

    model = Net(forward, inner=nn.Linear(3, 3))
    with no_trace(model):
        told = persample.explain(model, torch.randn(4, 3), backend=backend)
    assert told.supported is False
    assert any("rewrites its own parameter 'inner.weight'" in reason for reason in told.refusals)


# What it leaves alone, and what it needs.


class Restless(nn.Module):
    """Draws random numbers and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.dropout(self.inner(x))


def test_nothing_remains(backend: str, no_trace: Any) -> None:
    model, inputs = Restless(), torch.randn(4, 3)
    before = torch.get_rng_state()
    with no_trace(model, inputs):
        persample.explain(model, inputs, backend=backend)
    assert torch.equal(torch.get_rng_state(), before)


class _Explosive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Tensor:
        pytest.fail("the backward pass was run")


@pytest.mark.parametrize("backend", ["fused", "hooks", "opacus (rules)", "backpack (rules)"])
def test_no_backward_pass_is_run(backend: str) -> None:
    model = Net(lambda m, x: m.last(_Explosive.apply(m.first(x))), first=nn.Linear(3, 3), last=nn.Linear(3, 2))
    assert persample.explain(model, torch.randn(4, 3), backend=backend).supported


def test_a_loss_and_its_targets() -> None:
    model, inputs, targets = nn.Linear(3, 2), torch.randn(4, 3), torch.arange(4) % 2
    assert persample.explain(model, inputs, targets, nn.CrossEntropyLoss(), backend="hooks").supported
    with pytest.raises(LossError, match="reduction='none'"):
        persample.explain(model, inputs, targets, F.cross_entropy)
    with pytest.raises(BatchError, match="targets has 3"):
        persample.explain(model, inputs, targets[:3], nn.CrossEntropyLoss())
    with pytest.raises(OptionError, match="has no option 'speed'"):
        persample.explain(model, inputs, speed=11)


def test_the_loss_that_stands_for_none() -> None:
    recurrent = nn.LSTM(3, 2, batch_first=True)  # its last states are not batch-first
    assert persample.explain(recurrent, torch.randn(4, 5, 3), backend="loop").supported
    several = Net(lambda m, x: {"a": m.inner(x), "b": (m.inner(x)[:, 0], None, 3)}, inner=nn.Linear(3, 2))
    assert persample.explain(several, torch.randn(4, 3), backend="loop").supported
    with pytest.raises(LossError, match="pass loss_fn"):
        persample.explain(Net(lambda m, x: m.inner(x).sum(), inner=nn.Linear(3, 2)), torch.randn(4, 3))


class Picky(LoopSource):
    """Another's backend, which serves models of one layer."""

    method = "magic"

    def compute_moments(self, batch: Any) -> Any:
        if len(self.parameters()) > 2:
            raise UnsupportedModelError("Too many layers: use fewer.")
        return super().compute_moments(batch)


def test_backends_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.setattr(registry, "_load", lambda backend: Picky)
    persample.register_backend("picky", "somewhere:Picky")
    told = persample.explain(nn.Linear(3, 2), torch.randn(4, 3), backend="picky")
    assert (told.supported, hows(told)["weight"]) == (True, "magic")
    told = persample.explain(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), torch.randn(4, 3), backend="picky")
    assert (told.supported, told.refusals) == (False, ("Too many layers: use fewer.",))


class _Unseen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy(force=True) * weight.detach().numpy(force=True)).to(x.device)

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> Any:
        return None, deltas[0].sum(0)


def test_losses_that_no_sample_is_seen_to_enter() -> None:
    model = Net(lambda m, x: _Unseen.apply(x, m.scale), scale=parameter(3))  # type: ignore[no-untyped-call]
    assert statuses(persample.explain(model, torch.randn(4, 3))) == {"scale": "served"}


@pytest.mark.parametrize("backend", ["fused", "hooks", "vmap"])
@pytest.mark.parametrize("example", [None, torch.zeros(4, 3)], ids=["no batch", "batch"])
def test_scripted_modules(backend: str, example: Tensor | None) -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    for explained in (model, nn.Sequential(model, nn.Linear(4, 2))):
        explanation = persample.explain(explained, example, backend=backend)
        assert len(explanation.rows) == len(list(explained.parameters()))


# How it reads.


def test_as_text() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 2).requires_grad_(False))
    assert str(persample.explain(model, torch.randn(4, 3), backend="hooks")) == (
        "backend 'hooks' refuses this model\n"
        "  0.weight  served   Linear in '0'\n"
        "  0.bias    served   Linear in '0'\n"
        "  1.weight  refused  PReLU in '1'\n"
        "                     PReLU '1' has parameters of its own, and backend 'hooks' has no rule for it. Use backend "
        "'fused', or 'vjp', which serves every model.\n"
        "  2.weight  frozen\n"
        "  2.bias    frozen"
    )


def test_as_a_table() -> None:
    model = Net(lambda m, x: m.inner(x) * m.scale, inner=nn.Linear(3, 4), scale=parameter(4))
    model.add_module("norm", nn.BatchNorm1d(4))
    file = io.StringIO()
    Console(file=file, width=200).print(persample.explain(model, torch.randn(4, 3), backend="hooks"))
    text = file.getvalue()
    for part in ("backend 'hooks' refuses this model", "inner.weight", "4×3", "persample.fix(model)", "no rule for it"):
        assert part in text
