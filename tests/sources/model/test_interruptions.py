"""Ctrl-C, or any other exception, at any moment of a call leaves the model and PyTorch's switches as they were."""

from __future__ import annotations

import linecache
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _len_torch_function_stack
from torch.utils._python_dispatch import _len_torch_dispatch_stack

import persample
from persample import losses
from persample.errors import UnsupportedModelError
from persample.testing.devices import generator_of

METHODS = ("moments", "per_sample")
SOURCES = str(Path(persample.__file__).parent / "sources")
PUTTING_BACK = {"isolation.py", "state.py", "held.py"}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Counting(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


def net(backend: str, *middle: nn.Module) -> nn.Sequential:
    """A small model with buffers, hooks of the user, flags of different kinds, and gradients from before.

    Without hooks for the backends that serve a model with hooks by their rules, which are asked by names of their own.
    """
    model = nn.Sequential(nn.Linear(3, 4), Counting(), *middle, nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    if backend not in ("backpack", "opacus"):
        model[0].register_forward_hook(lambda module, args, output: None)
    model[-1].eval()
    model[-3].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    return model


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 3).double(), torch.arange(5) % 2


def make(backend: str, model: nn.Module, loss_fn: Any = losses.cross_entropy, **options: Any) -> Any:
    if backend == "vmap":
        options = {"randomness": "different"} | options
    return persample.make_source(backend, model, loss_fn, **options)


@contextmanager
def switches_kept() -> Iterator[None]:
    """Assert that PyTorch's switches are afterwards what they were before."""
    before = _switches()
    try:
        yield
    finally:
        assert _switches() == before


def _switches() -> dict[str, Any]:
    return {
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        ),
        "function modes": _len_torch_function_stack(),
        "torch functions": torch._C._is_torch_function_enabled(),
        "dispatch modes": _len_torch_dispatch_stack(),
        "transforms of torch.func": torch._C._functorch.peek_interpreter_stack() is None,
        "hooks on saved tensors": torch._C._autograd._top_saved_tensors_default_hooks(False) is None,
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "lock": _others_can_call(),
    }


def _others_can_call() -> bool:
    """Whether another thread gets a call through."""
    source = persample.make_source("loop", nn.Linear(1, 2), losses.cross_entropy, check="never")
    thread = threading.Thread(target=source.moments, args=(torch.ones(1, 1), torch.tensor([0])), daemon=True)
    thread.start()
    thread.join(timeout=10)
    return not thread.is_alive()


class Interrupting:
    """Raises in its n-th call."""

    def __init__(self, error: type[BaseException], calls_before: int) -> None:
        self.error = error
        self.calls_left = calls_before

    def __call__(self, value: Any) -> Any:
        self.calls_left -= 1
        if self.calls_left < 0:
            raise self.error
        return value


class InForward(nn.Module):
    """Calls something that may raise in the forward pass."""

    def __init__(self, interrupting: Interrupting) -> None:
        super().__init__()
        self.interrupting = interrupting

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.interrupting(x) * 1
        return output


class InBackward(torch.autograd.Function):
    """Calls something that may raise in the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, interrupting: Interrupting) -> Tensor:
        return x * 1

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.interrupting = inputs[1]

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Any:
        return ctx.interrupting(delta), None


class Applied(nn.Module):
    def __init__(self, interrupting: Interrupting) -> None:
        super().__init__()
        self.interrupting = interrupting

    def forward(self, x: Tensor) -> Tensor:
        return InBackward.apply(x, self.interrupting)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("place", ["forward", "loss", "backward"])
@pytest.mark.parametrize("method", METHODS)
def test_interrupted_in_the_users_code(
    backend: str, method: str, place: str, error: type[BaseException], no_trace: Any
) -> None:
    """In the first, second, … run of that code, until a call needs no more of them: those of the check, too."""
    for calls_before in range(100):
        interrupting = Interrupting(error, calls_before)
        model = net(
            backend, {"forward": InForward, "loss": lambda _: nn.Identity(), "backward": Applied}[place](interrupting)
        )

        def loss_fn(outputs: Tensor, targets: Tensor, interrupting: Any = interrupting) -> Tensor:
            return losses.cross_entropy(interrupting(outputs) if place == "loss" else outputs, targets)

        inputs, targets = batch()
        source = make(backend, model, loss_fn)
        try:
            with (
                no_trace(model, inputs, targets),
                switches_kept(),
                torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=False),
            ):
                getattr(source, method)(inputs, targets)
        except error:
            continue
        except UnsupportedModelError:
            assert place == "backward"
            assert backend in ("hooks", "backpack", "opacus", "vmap")
            return
        except AssertionError:
            assert interrupting.calls_left >= 0  # nothing was raised, so buffers may change as in a forward pass
        assert interrupting.calls_left >= 0, "the error was swallowed"
        assert calls_before > 0
        return
    pytest.fail("the call never ended")


@contextmanager
def interrupted_at(line: int) -> Iterator[list[int]]:
    """Raise KeyboardInterrupt before the given line, counted as they are run, of the code of the sources.

    The code that puts things back is let alone: what it can be interrupted by is a second Ctrl-C. So are the lines
    with `with`, at which Python stops once more on leaving, and what follows when everything is put back.
    """
    count = [0]

    def tracer(frame: FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(SOURCES) or Path(code.co_filename).name in PUTTING_BACK:
            return None
        if code.co_name in METHODS:
            return None
        if event == "line" and not linecache.getline(code.co_filename, frame.f_lineno).lstrip().startswith("with "):
            count[0] += 1
            if count[0] == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return tracer

    sys.settrace(tracer)
    try:
        yield count
    finally:
        sys.settrace(None)


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_anywhere(backend: str, method: str, no_trace: Any) -> None:
    inputs, targets = batch()
    source = make(backend, net(backend), check="always")
    with interrupted_at(-1) as count:
        getattr(source, method)(inputs, targets)
    assert count[0] > 100
    generator = generator_of(0)
    for line in torch.randint(1, count[0], (60,), generator=generator).tolist():
        model = net(backend)
        source = make(backend, model, check="always")
        with no_trace(model, inputs, targets), switches_kept(), pytest.raises(KeyboardInterrupt), interrupted_at(line):
            getattr(source, method)(inputs, targets)
        again = getattr(source, method)(inputs, targets)
        assert again is not None


def test_threads_that_fail_do_not_disturb_the_others(backend: str, per_sample_truth: Any, no_trace: Any) -> None:
    """Six threads with six models: three of them are interrupted again and again, in forward or in loss."""
    models = [net(backend, InForward(Interrupting(KeyError, 3 * i % 4)) if i % 2 else nn.Identity()) for i in range(6)]
    data = batch()
    truths = [None if i % 2 else per_sample_truth(models[i], losses.cross_entropy, *data) for i in range(6)]
    start = threading.Barrier(6, timeout=60)
    problems: list[BaseException] = []

    def work(i: int) -> None:
        start.wait()
        for _ in range(5):
            source = make(backend, models[i])
            if i % 2:
                models[i][2].interrupting.calls_left = 3 * i % 4
                with pytest.raises(KeyError):
                    source.moments(*data)
            else:
                found = source.per_sample(*data)
                torch.testing.assert_close(found, truths[i].gradients, rtol=1e-9, atol=1e-12)

    def run(i: int) -> None:
        try:
            work(i)
        except BaseException as problem:  # noqa: BLE001 - it is raised below, in the thread of the test
            problems.append(problem)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    with switches_kept():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    if problems:
        raise problems[0]


@pytest.mark.parametrize("method", METHODS)
def test_refusals_draw_no_random_numbers(backend: str, method: str) -> None:
    model, data = net(backend, nn.Dropout(), nn.BatchNorm1d(4).double()), batch()
    before = torch.get_rng_state()
    with pytest.raises(UnsupportedModelError):
        getattr(make(backend, model), method)(*data)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", METHODS)
def test_switches_of_the_user_are_kept(backend: str, method: str) -> None:
    model = net(backend)
    inputs, targets = batch()
    used: list[Callable[[], Any]] = [
        torch.no_grad,
        lambda: torch.autocast(torch.get_default_device().type, torch.bfloat16),
        lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    ]
    for switch in used:
        with switch(), switches_kept():
            try:
                getattr(make(backend, model, check="never"), method)(inputs, targets)
            except UnsupportedModelError:
                assert backend == "vmap"  # torch.func knows no hooks on saved tensors
