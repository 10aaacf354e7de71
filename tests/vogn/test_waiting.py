"""Where a step reads a value, a GPU must be waited for: found without one, by the operations that tell Python one."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import persample
from persample.kernels.compiled import without_kernels
from persample.sources.backends.fused.replay import untried
from persample.testing.devices import on_cuda

#: Not by its name, which that of the checkout may be, too.
PACKAGE = Path(persample.__file__).parent

#: Operations whose results Python reads, whose shape depends on values, or that copy numbers of Python to a GPU.
WAITING = {
    *("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero"),
    "lift_fresh",
}


def _caller() -> str:
    """The function of the package that is being run, or none."""
    own = [frame for frame in traceback.extract_stack() if PACKAGE in Path(frame.filename).parents]
    return own[-1].name if own else ""


class Waits(TorchDispatchMode):
    """Notes the function of the package from which such an operation was called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.removeprefix("aten::") in WAITING:
            self.found.append(_caller())
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _as_on_a_gpu() -> Iterator[None]:
    """Without the kernels of CPUs, in which nothing is seen."""
    with without_kernels():
        yield


def waits_in(call: Callable[[], object]) -> list[str]:
    """Where a call would wait for a GPU, and does on one."""
    with pytest.MonkeyPatch.context() as patch, Waits() as waits:
        read = torch.Tensor.tolist
        patch.setattr(torch.Tensor, "tolist", lambda self: (waits.found.append(_caller()), read(self))[1])
        call()
    return waits.found


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear layers": (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), (4,)),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)
        ),
        (1, 8, 8),
    ),
    "attention": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), nn.Flatten(), nn.Linear(40, 3)
        ),
        (5, 8),
    ),
}


class Positions(nn.Module):
    """Looks up embeddings of its positions."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.head = nn.Embedding(7, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((x + self.positions(torch.arange(x.shape[1], device=x.device))).mean(1))


RULES = {
    "VOGN": {"hess_init": 0.5},
    "VOGN, all settings": {"max_grad_norm": 1.0, "max_update": 0.1, "temperature_steps": 9, "damping": 0.1},
    "IVON": {},
    "Vadam": {},
    "OGN": {},
}


def optimizer_of(name: str, model: nn.Module, **options: Any) -> Any:
    rule = getattr(persample, name.partition(",")[0])
    return rule(model, persample.losses.cross_entropy, data_size=60, lr=0.01, **RULES[name], **options)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_waits_for_its_losses_and_once_for_its_result(name: str) -> None:
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model, inputs, targets = build(), torch.randn(6, *shape), torch.randint(3, (6,))
    vogn = persample.VOGN(model, persample.losses.cross_entropy, data_size=60, lr=0.01, hess_init=0.5)
    for _ in range(3):  # checks, chooses forms, remembers where the samples are
        vogn.observe(inputs, targets)
        vogn.step()
    assert waits_in(lambda: vogn.observe(inputs, targets)) == ["require_losses"]
    assert waits_in(vogn.step) == ["first_non_finite"]


def test_positions_are_looked_at_on_a_cpu_alone() -> None:
    torch.manual_seed(0)
    model, inputs, targets = Positions(), torch.randn(6, 5, 8), torch.randint(3, (6,))
    source = persample.make_source("fused", model, persample.losses.cross_entropy, check="never")
    for _ in range(3):
        source.moments(inputs, targets)
    looked = ["_are_different"] if inputs.device.type == "cpu" else []
    assert waits_in(lambda: source.moments(inputs, targets)) == [*looked, "require_losses"]


def problem(name: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    build, shape = MODELS[name]
    return build(), torch.randn(6, *shape), torch.randint(3, (6,))


@pytest.mark.parametrize("rule", RULES)
def test_a_step_of_every_rule_waits_as_often(rule: str) -> None:
    model, inputs, targets = problem("convolutions")
    optimizer = optimizer_of(rule, model)
    for _ in range(3):
        optimizer.observe(inputs, targets)
        optimizer.step()
    assert waits_in(lambda: optimizer.observe(inputs, targets)) == ["require_losses"]
    assert waits_in(optimizer.step) == ["first_non_finite"]


@pytest.mark.parametrize(("rule", "backend"), [("VOGN", "fused"), ("VOGN", "hooks"), ("IVON", None)])
@pytest.mark.parametrize("parts", [1, 2])
def test_recorded_passes_do_not_wait_for_each_parameter(rule: str, backend: str | None, parts: int) -> None:
    """Gradients are accumulated over `parts`; twice the parameters must not make it wait more often."""
    numbers = []
    for layers in (1, 3):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(layers)], nn.Linear(4, 3))
        inputs, targets = torch.randn(6, 4), torch.randint(3, (6,))
        optimizer = optimizer_of(rule, model, **({"backend": backend} if backend else {}))

        def passes(optimizer: Any = optimizer, model: Any = model, x: Any = inputs, y: Any = targets) -> None:
            optimizer.zero_grad()
            with optimizer.sampled_params(train=True):
                for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                    F.cross_entropy(model(a), b).backward()

        for _ in range(3):
            passes()
            optimizer.step()
        found = waits_in(passes) + waits_in(optimizer.step)
        numbers.append(len([name for name in found if name != "_equal"]))  # one by one on a CPU alone
    assert numbers[0] == numbers[1]
    assert numbers[0] <= 8 * parts


def operations_in(call: Callable[[], object]) -> list[str]:
    """The operations of PyTorch in a call, seen by the profiler, which hinders no replay."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call()
    return [event.name.removeprefix("aten::") for event in profiler.events()]


@pytest.mark.skipif(not untried.DYNAMO_SEES_CHANGES, reason="PyTorch is too old to record steps")
@pytest.mark.parametrize("name", MODELS)
def test_a_replayed_step_waits_as_often(name: str) -> None:
    model, inputs, targets = problem(name)
    optimizer = optimizer_of("VOGN", model, backend_options={"compile": True})
    for _ in range(4):
        optimizer.observe(inputs, targets)
        optimizer.step()
    assert optimizer.source.ran == "replayed", optimizer.source.ran_because
    for call in (lambda: optimizer.observe(inputs, targets), optimizer.step):
        assert [name for name in operations_in(call) if name in WAITING] == ["_local_scalar_dense"]
    assert optimizer.source.ran == "replayed"


@pytest.mark.skipif(not on_cuda(), reason="needs a GPU (PERSAMPLE_TEST_DEVICE=cuda)")
@pytest.mark.parametrize("compile", [False, True, "cuda-graph"])
@pytest.mark.parametrize("name", MODELS)
def test_a_gpu_is_waited_for_at_these_places_alone(name: str, compile: Any) -> None:
    """PyTorch's own word: it raises wherever Python waits, but where the two numbers of a step are read."""
    model, inputs, targets = problem(name)
    optimizer = optimizer_of("VOGN", model, backend_options={"compile": compile})
    for _ in range(4):
        optimizer.observe(inputs, targets)
        optimizer.step()

    def read(number: torch.Tensor) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        try:
            return own(number)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    own, reads = torch.Tensor.item, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "item", lambda self: (reads.append(_caller()), read(self))[1])
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.observe(inputs, targets)
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert reads == ["require_losses", "first_non_finite"]
