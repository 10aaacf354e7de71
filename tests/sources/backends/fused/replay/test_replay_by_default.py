"""Where nobody asks for it, a step is recorded when it is worth it, and nobody sees a difference."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import persample
from persample.kernels.compiled import without_kernels
from persample.quantities import Norms
from persample.sources.backends.fused import FusedSource
from persample.sources.backends.fused.replay import replay, untried
from persample.sources.backends.fused.replay.patience import Patience
from persample.testing.devices import generator_of, generator_state, set_generator_state
from persample.testing.zoo.case import Net

CALLS = 2


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Record after two calls, however fast they are, and however long it takes."""
    recorded = Patience.recorded
    monkeypatch.setattr(Patience, "recorded", lambda self, seconds: recorded(self, 0.0))
    monkeypatch.setattr(replay, "_CALLS", CALLS)
    monkeypatch.setattr(replay, "_SECONDS", 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def source_of(model: nn.Module, **options: Any) -> FusedSource:
    source = persample.make_source("fused", model, persample.losses.cross_entropy, check="never", **options)
    assert isinstance(source, FusedSource)
    return source


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def data(seed: int = 0, size: int = 6) -> tuple[Tensor, Tensor]:
    generator = generator_of(seed)
    return torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator)


def ran(source: FusedSource, calls: int, size: int = 6) -> list[str | None]:
    found = []
    for call in range(calls):
        source.moments(*data(call, size))
        found.append(source.ran)
    return found


def test_a_kind_of_batch_is_recorded_when_it_has_come_a_few_times() -> None:
    source = source_of(mlp())
    assert ran(source, 4) == [None, None, "replayed", "replayed"]
    assert ran(source, 3, size=5) == [None, None, "replayed"]
    assert ran(source, 1) == ["replayed"]
    for expected in (None, None, "replayed"):
        source.compute(*data(), Norms())
        assert source.ran == expected
    assert copy.deepcopy(source).ran == "replayed"
    assert ran(copy.deepcopy(source), 1) == [None]


def test_short_scripts_and_explain_record_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    torch.set_num_threads(1)
    monkeypatch.setattr(replay, "_SECONDS", 3600.0)
    assert ran(source_of(mlp()), 20) == [None] * 20
    assert "replayed" not in str(persample.explain(mlp(), *data(), persample.losses.cross_entropy))
    script = (
        "import sys, torch, persample; model = torch.nn.Linear(4, 3);"
        "source = persample.make_source('fused', model, persample.losses.cross_entropy);"
        "[source.moments(torch.randn(6, 4), torch.arange(6) % 3) for _ in range(9)];"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_it_can_be_switched_off() -> None:
    source = source_of(mlp(), compile=False)
    assert ran(source, 5) == [None] * 5
    assert source.replay is None


def test_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    patience = Patience(3, 1.0)
    for _ in range(3):
        assert not patience.is_due("short")
        patience.came("short", 0.1)
        patience.came("long", 2.0)
    assert not patience.is_due("short")
    assert patience.is_due("long")
    patience.recorded(100.0)
    assert patience.is_due("long")
    for _ in range(3):
        patience.came("other", 2.0)
    assert not patience.is_due("other")
    for number in range(1000):
        patience.came(number, 1.0)
    assert len(patience._came) <= 64


def test_what_changes_in_every_call_is_recorded_twice_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Patience, "recorded", lambda self, seconds: counted(self))
    recordings = []

    def counted(patience: Patience) -> None:
        recordings.append(patience)
        patience._in_vain += 1

    model: Any = Net(lambda m, x: m.last(torch.tanh(m.first(x)) * m.scale), first=nn.Linear(4, 5), last=nn.Linear(5, 3))
    source = source_of(model)
    for call in range(10):
        model.scale = 1.0 + call
        source.moments(*data(call))
    assert len(recordings) == 2
    assert source.ran == "eager"
    assert "no later call" in source.ran_because


def test_it_says_nothing_unless_it_is_asked(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    def deciding(m: Any, x: Tensor) -> Tensor:
        return m.layer(x if m.layer.weight.sum() > 0 else -x)  # type: ignore[no-any-return]

    source = source_of(Net(deciding, layer=nn.Linear(4, 3)))
    with caplog.at_level(logging.INFO, "persample"):
        assert ran(source, 4)[-1] == "eager"
    assert [record.levelno for record in caplog.records if record.name.startswith("persample")] == [logging.INFO]
    assert "ata-dependent" in source.ran_because
    various = source_of(mlp())
    for size in range(2, 16):  # more than Dynamo keeps graphs
        ran(various, 4, size)
    assert capfd.readouterr() == ("", "")
    assert [record.name for record in caplog.records if record.levelno > logging.INFO] == []


class _Traced:
    def __enter__(self) -> None:
        self.before = sys.gettrace()
        sys.settrace(lambda frame, event, argument: None)

    def __exit__(self, *error: object) -> None:
        sys.settrace(self.before)


OFF: dict[str, Callable[[], Any]] = {
    "stance": lambda: torch.compiler.set_stance("force_eager"),
    "configuration": lambda: torch._dynamo.config.patch(disable=True),
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),  # type: ignore[no-untyped-call]
    "debugger": _Traced,
    "saved tensors": lambda: torch.autograd.graph.save_on_cpu(),
}


@pytest.mark.parametrize("name", OFF)
@pytest.mark.filterwarnings("ignore:Anomaly")
def test_where_python_is_to_be_run_it_is(name: str) -> None:
    source = source_of(mlp())
    assert ran(source, 4)[-1] == "replayed"
    with OFF[name]():
        assert ran(source, 1) == ["eager"]
    assert ran(source, 1) == ["replayed"]
    with OFF[name]():
        assert "replayed" not in ran(source_of(mlp()), 4)


def test_an_older_dynamo(monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(mlp(), compile=True)
    assert ran(source, 3)[-1] == "replayed"
    monkeypatch.setattr(untried, "DYNAMO_SEES_CHANGES", False)
    assert ran(source, 3) == ["eager"] * 3
    assert ran(source_of(mlp(), compile=True), 3) == ["eager"] * 3
    assert f"PyTorch {torch.__version__} does not see all" in source.ran_because


def test_without_dynamo(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("Dynamo is not supported on this platform")

    monkeypatch.setattr(torch, "compile", missing)
    source = source_of(mlp())
    assert ran(source, 5) == [None, None, "eager", "eager", "eager"]
    assert "not supported" in source.ran_because


def test_the_users_own_compiled_functions_stay_compiled() -> None:
    captured = []

    def backend(graph: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        captured.append(graph)
        return graph.forward

    model = mlp()
    compiled = torch.compile(model, backend=backend)
    source = source_of(model)
    for call in range(6):
        compiled(data(call)[0])
        ran(source, 1)
    assert source.ran == "replayed"
    assert len(captured) == 1


# Killed and resumed.


class Encoder(nn.Module):
    """Dropout, attention, a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.head(self.encoder(x)[:, 0])  # type: ignore[no-any-return]


def lenet() -> nn.Module:
    convolutions = [nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))


def residual() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.norm(m.first(x)))
        h = h + m.norm(m.second(h))
        return m.head(F.dropout(h.mean((2, 3)), 0.3, m.training))  # type: ignore[no-any-return]

    layers = {"first": nn.Conv2d(1, 8, 3, padding=1), "second": nn.Conv2d(8, 8, 3, padding=1)}
    return Net(forward, norm=nn.GroupNorm(2, 8), head=nn.Linear(8, 3), **layers)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LeNet": (lenet, (1, 16, 16)),
    "residual": (residual, (1, 8, 8)),
    "encoder": (Encoder, (5, 8)),
}


@pytest.mark.parametrize("name", MODELS)
def test_recorded_steps_take_the_kernels_that_compute_now(name: str) -> None:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().eval()
    x, y = torch.randn(8, *shape), torch.arange(8) % 3
    source, plain = source_of(model, deterministic=True), source_of(model, deterministic=True, compile=False)
    with_kernels = [source.moments(x, y) for _ in range(CALLS + 2)][-1]
    with without_kernels():
        found, expected = source.moments(x, y), plain.moments(x, y)
        assert source.ran == "replayed"
    for kind in ("mean", "second_moment"):
        for key, value in getattr(expected, kind).items():
            assert torch.equal(getattr(found, kind)[key], value)
            torch.testing.assert_close(getattr(with_kernels, kind)[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name: str) -> None:
    make, shape = MODELS[name]
    generator = generator_of(1)
    x = torch.randn(10, 8, *shape, generator=generator)
    y = torch.randint(3, (10, 8), generator=generator)

    def begin(**options: Any) -> tuple[nn.Module, persample.VOGN]:
        torch.manual_seed(0)
        model = make()
        options = {"deterministic": True, **options}
        return model, persample.VOGN(
            model, persample.losses.cross_entropy, data_size=80, lr=0.01, mc_samples=2, backend_options=options
        )

    def end(model: nn.Module, optimizer: persample.VOGN, steps: range) -> Tensor:
        for step in steps:
            optimizer.observe(x[step], y[step])
            optimizer.step()
        values = [*model.parameters(), *[s["curvature"] for s in optimizer.state.values()]]
        return torch.cat([*[t.detach().flatten() for t in values], torch.rand(1)])

    model, optimizer = begin(compile=False)
    end(model, optimizer, range(6))
    plain = end(model, optimizer, range(6, 10))

    model, optimizer = begin()
    end(model, optimizer, range(6))
    assert optimizer.source.ran == "replayed", optimizer.source.ran_because
    saved, drawn = copy.deepcopy((model.state_dict(), optimizer.state_dict())), generator_state()
    uninterrupted = end(model, optimizer, range(6, 10))

    model, optimizer = begin()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    set_generator_state(drawn)
    resumed = end(model, optimizer, range(6, 10))
    assert optimizer.source.ran == "replayed"
    assert torch.equal(uninterrupted, resumed)

    model, optimizer = begin()  # on a machine without the kernels, say: the same to rounding
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    torch.set_rng_state(drawn)
    with without_kernels():
        elsewhere = end(model, optimizer, range(6, 10))
    torch.testing.assert_close(elsewhere, uninterrupted, rtol=1e-3, atol=1e-4)
    assert torch.equal(uninterrupted, plain)
