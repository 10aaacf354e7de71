"""A recorded step is exact after whatever changes between two calls, or the call goes the ordinary way."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import os
import pickle
import random
import subprocess
import sys
import textwrap
import threading
import types
import warnings
import weakref
from abc import ABC
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import persample
from persample.errors import PersampleError
from persample.quantities import (
    Gram,
    Mean,
    Norms,
    PerSample,
    Projection,
    SecondMoment,
    Variance,
    WeightedSum,
    clipping,
)
from persample.quantities.computed import numbers_in
from persample.sources.backends.fused import FusedSource
from persample.sources.backends.fused.replay import graph
from persample.testing import ZOO
from persample.testing.devices import generator_of
from persample.testing.trace import no_trace
from persample.testing.zoo.case import Net

SETTINGS: dict[str, Any] = {}


def setting(name: str) -> Any:
    return SETTINGS[name]


@functools.lru_cache
def remembered(name: str) -> Any:
    return SETTINGS[name]


@torch.compiler.allow_in_graph
def hidden(x: Tensor) -> Tensor:
    return x * SETTINGS["scale"]


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    SETTINGS.clear()
    SETTINGS.update(scale=1.0, list=[1.0], object=types.SimpleNamespace(scale=1.0), array=np.ones(1))
    remembered.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.flatten(1) - targets).square().sum(1)


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"first": nn.Linear(4, 5), "last": nn.Linear(5, 3)}


def data(size: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = generator_of(seed)
    x = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    return x, torch.randn(size, 3, generator=generator, dtype=torch.float64)


def source_of(model: nn.Module, loss: Callable[..., Any] = loss_fn, **options: Any) -> FusedSource:
    source = persample.make_source("fused", model, loss, compile=True, **options)
    assert isinstance(source, FusedSource)
    return source


def truth(model: nn.Module, x: Any, y: Tensor, loss: Callable[..., Any] = loss_fn) -> persample.Moments:
    """The moments by one backward pass for each sample, on a copy of the model, with the coming random numbers."""
    twin = copy.deepcopy(model)
    parameters = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    with torch.random.fork_rng(), _python_kept():
        losses = loss(twin(x), y)
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for one in losses:
        found = torch.autograd.grad(one, list(parameters.values()), retain_graph=True, allow_unused=True)
        for (name, p), g in zip(parameters.items(), found, strict=True):
            rows[name].append(torch.zeros_like(p) if g is None else g)
    stacked = {name: torch.stack(row) for name, row in rows.items()}
    squares = {name: g.square().mean(0) for name, g in stacked.items()}
    return persample.Moments(losses.detach(), {name: g.mean(0) for name, g in stacked.items()}, squares)


class _python_kept:  # noqa: N801 - reads as a function
    def __enter__(self) -> None:
        self.kept = random.getstate(), np.random.get_state()

    def __exit__(self, *error: object) -> None:
        random.setstate(self.kept[0])
        np.random.set_state(self.kept[1])


def require_right(found: persample.Moments, expected: persample.Moments, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found.losses, expected.losses, rtol=tolerance, atol=tolerance)
    assert list(found.mean) == list(found.second_moment) == list(expected.mean)
    for name in expected.mean:
        for a, b in ((found.mean, expected.mean), (found.second_moment, expected.second_moment)):
            torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=name)


def follow(model: nn.Module, change: Callable[[int], object], *, loss: Callable[..., Any] = loss_fn, calls: int = 6,
           check: str = "never") -> list[str | None]:  # fmt: skip
    """Call the source again and again with a change in between; return how each call was served."""
    model.double()
    source = source_of(model, loss, check=check)
    ran = []
    for call in range(calls):
        change(call)
        x, y = data(seed=call)
        expected = truth(model, x, y, loss)
        require_right(source.moments(x, y), expected)
        ran.append(source.ran)
    return ran


def scaled(read: Callable[[Any], Any]) -> nn.Module:
    """A model whose hidden units are multiplied by what `read` returns."""
    return Net(lambda m, x: m.last(torch.tanh(m.first(x)) * read(m)), **layers())


# What serves as it is.


def test_a_step_is_replayed_and_exact() -> None:
    assert follow(scaled(lambda m: 2.0), lambda call: None) == ["replayed"] * 6


def test_results_are_those_of_the_ordinary_way_bit_for_bit() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 4))
    x, y = torch.randn(8, 2, 8, 8), torch.randint(4, (8,))
    ordinary = persample.make_source("fused", model, persample.losses.cross_entropy, deterministic=True)
    replayed = source_of(model, persample.losses.cross_entropy, deterministic=True)
    for _ in range(3):
        expected, found = ordinary.moments(x, y), replayed.moments(x, y)
        for name in expected.mean:
            assert torch.equal(expected.mean[name], found.mean[name])
            assert torch.equal(expected.second_moment[name], found.second_moment[name])
    assert replayed.ran == "replayed"
    for call in (lambda: replayed.compute(x, y, Norms(), groups=[0] * len(x)), lambda: replayed.per_sample(x, y)):
        call()
        assert replayed.ran is None, "what ran is that of the last call"
        replayed.moments(x, y)
        assert replayed.ran == "replayed"


# What changes between calls.


def attribute(name: str, values: list[Any]) -> tuple[nn.Module, Callable[[int], object]]:
    model = scaled(lambda m: getattr(m, name))
    return model, lambda call: setattr(model, name, values[call])


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], tuple[nn.Module, Callable[[int], object]]]] = {}


def changing(function: Callable[[pytest.MonkeyPatch], Any]) -> Callable[[pytest.MonkeyPatch], Any]:
    CHANGES[function.__name__] = function
    return function


@changing
def float_attribute(patch: pytest.MonkeyPatch) -> Any:
    return attribute("scale", [1.0, 1.0, 2.0, -3.0, 1.0, 0.5])


@changing
def integer_attribute(patch: pytest.MonkeyPatch) -> Any:
    return attribute("scale", [1, 1, 2, -3, 0, 5])


@changing
def tensor_attribute_in_place(patch: pytest.MonkeyPatch) -> Any:
    model = scaled(lambda m: m.scale)
    model.scale = torch.ones(5, dtype=torch.float64)
    return model, lambda call: model.scale.add_(call)


@changing
def tensor_attribute_replaced(patch: pytest.MonkeyPatch) -> Any:
    return attribute("scale", [torch.full((5,), float(n), dtype=torch.float64) for n in range(6)])


@changing
def tensor_made_of_an_attribute(patch: pytest.MonkeyPatch) -> Any:
    def factors(m: Any) -> Tensor:
        made = torch.tensor([m.scale, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
        return made.mul_(2)  # a replay begins with the numbers once more

    model = scaled(factors)
    return model, lambda call: setattr(model, "scale", 1.0 + call // 3)


@changing
def tensor_made_of_sizes(patch: pytest.MonkeyPatch) -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        beside = torch.cat([m.token.expand(len(x), 1, 4), x.unsqueeze(1), x.unsqueeze(1).sin()], 1)
        return m.last(torch.tanh(m.first(beside))[:, 0])  # type: ignore[no-any-return]

    model = Net(forward, token=nn.Parameter(torch.randn(1, 1, 4)), **layers())
    return model, lambda call: None


@changing
def tensor_attribute_of_one_value(patch: pytest.MonkeyPatch) -> Any:
    return attribute("scale", [torch.tensor(float(n + 1), dtype=torch.float64) for n in range(6)])


@changing
def attribute_of_another_kind(patch: pytest.MonkeyPatch) -> Any:
    return attribute("scale", [1.0, 1, True, torch.tensor(2.0), np.float64(3.0), 4])


@changing
def list_appended(patch: pytest.MonkeyPatch) -> Any:
    model = scaled(lambda m: sum(m.factors))
    model.factors = [1.0]
    return model, lambda call: model.factors.append(float(call))


@changing
def dict_entry(patch: pytest.MonkeyPatch) -> Any:
    model = scaled(lambda m: m.table["scale"])
    model.table = {"scale": 1.0}
    return model, lambda call: model.table.update(scale=1.0 + call)


@changing
def flag(patch: pytest.MonkeyPatch) -> Any:
    model = Net(lambda m, x: m.last(torch.tanh(m.first(x)) if m.squash else m.first(x).sin()), **layers())
    return model, lambda call: setattr(model, "squash", call % 2 == 0)


@changing
def function_attribute(patch: pytest.MonkeyPatch) -> Any:
    model = Net(lambda m, x: m.last(m.nonlinearity(m.first(x))), **layers())
    functions = [torch.tanh, torch.sin, torch.tanh, F.softplus, lambda h: h * 2, torch.sin]
    return model, lambda call: setattr(model, "nonlinearity", functions[call])


@changing
def global_value(patch: pytest.MonkeyPatch) -> Any:
    return scaled(lambda m: setting("scale")), lambda call: SETTINGS.update(scale=1.0 + call // 2)


@changing
def global_list(patch: pytest.MonkeyPatch) -> Any:
    return scaled(lambda m: len(SETTINGS["list"])), lambda call: SETTINGS["list"].append(1.0)


@changing
def global_object(patch: pytest.MonkeyPatch) -> Any:
    return scaled(lambda m: SETTINGS["object"].scale), lambda call: setattr(SETTINGS["object"], "scale", 1.0 + call)


@changing
def global_array(patch: pytest.MonkeyPatch) -> Any:
    def change(call: int) -> None:
        SETTINGS["array"][0] = 1.0 + call

    return scaled(lambda m: float(SETTINGS["array"][0])), change


@changing
def global_array_as_tensor(patch: pytest.MonkeyPatch) -> Any:
    def change(call: int) -> None:
        SETTINGS["array"][0] = 1.0 + call

    return scaled(lambda m: torch.as_tensor(SETTINGS["array"])), change


@changing
def global_function(patch: pytest.MonkeyPatch) -> Any:
    model = scaled(lambda m: setting("scale"))
    return model, lambda call: patch.setitem(globals(), "setting", lambda name: 1.0 + call // 2)


@changing
def remembered_value(patch: pytest.MonkeyPatch) -> Any:
    def change(call: int) -> None:
        SETTINGS["scale"] = 1.0 + call
        if call == 3:
            remembered.cache_clear()

    return scaled(lambda m: remembered("scale")), change


@changing
def value_of_a_function_that_dynamo_does_not_enter(patch: pytest.MonkeyPatch) -> Any:
    model = Net(lambda m, x: m.last(hidden(torch.tanh(m.first(x)))), **layers())
    return model, lambda call: SETTINGS.update(scale=1.0 + call)


@changing
def closure(patch: pytest.MonkeyPatch) -> Any:
    scale = 1.0

    def change(call: int) -> None:
        nonlocal scale
        scale = 1.0 + call

    return scaled(lambda m: scale), change


@changing
def default_argument(patch: pytest.MonkeyPatch) -> Any:
    def read(m: Any, scale: float = 1.0) -> float:
        return scale

    return scaled(read), lambda call: setattr(read, "__defaults__", (1.0 + call,))


@changing
def class_attribute(patch: pytest.MonkeyPatch) -> Any:
    class Own(Net):
        scale = 1.0

    model = Own(lambda m, x: m.last(torch.tanh(m.first(x)) * m.scale), **layers())
    return model, lambda call: setattr(Own, "scale", 1.0 + call)


@changing
def method_replaced(patch: pytest.MonkeyPatch) -> Any:
    class Own(Net):
        def read(self) -> float:
            return 1.0

    model = Own(lambda m, x: m.last(torch.tanh(m.first(x)) * m.read()), **layers())
    return model, lambda call: setattr(Own, "read", lambda self: 1.0 + call)


@changing
def property_of_another_object(patch: pytest.MonkeyPatch) -> Any:
    class Schedule:
        step = 0

        @property
        def scale(self) -> float:
            return 1.0 + self.step

    schedule = Schedule()
    return scaled(lambda m: schedule.scale), lambda call: setattr(schedule, "step", call)


@changing
def identity_of_another_object(patch: pytest.MonkeyPatch) -> Any:
    one, other = object(), object()
    setting = types.SimpleNamespace(kind=one)
    return scaled(lambda m: 2.0 if setting.kind is one else 1.0), lambda call: setattr(
        setting, "kind", one if call % 2 else other
    )


@changing
def order_of_another_object(patch: pytest.MonkeyPatch) -> Any:
    table = OrderedDict(a=1.0, b=2.0)
    return scaled(lambda m: sum(n * v for n, v in enumerate(table.values()))), lambda call: table.move_to_end("a")


@changing
def key_that_was_missing(patch: pytest.MonkeyPatch) -> Any:
    table: dict[str, float] = {}

    def read(m: Any) -> float:
        try:
            return table["scale"]
        except KeyError:
            return 1.0

    return scaled(read), lambda call: table.update(scale=2.0) if call == 2 else None


@changing
def key_that_was_missing_inside_of_a_mapping(patch: pytest.MonkeyPatch) -> Any:
    """As `Mapping.get` catches it."""
    table: UserDict[str, float] = UserDict()
    return scaled(
        lambda m: Mapping.get(table, "scale", 1.0)
    ), lambda call: table.update(scale=2.0) if call == 2 else None


@changing
def computed_key_that_was_missing(patch: pytest.MonkeyPatch) -> Any:
    tables: tuple[dict[str, float], ...] = ({}, {})

    def read(m: Any) -> float:
        scale = 1.0
        for table in tables:
            try:
                scale += table["sca" + m.ending]
            except KeyError:
                scale *= 2
        return scale

    model = scaled(read)
    model.ending = "le"
    return model, lambda call: tables[call % 2].update(scale=2.0 + call) if call > 1 else None


@changing
def attribute_that_was_missing_among_keys(patch: pytest.MonkeyPatch) -> Any:
    settings = types.SimpleNamespace()

    def read(m: Any) -> float:
        try:
            return vars(settings)["sca" + m.ending]  # type: ignore[no-any-return]
        except KeyError:
            return 1.0

    model = scaled(read)
    model.ending = "le"
    return model, lambda call: setattr(settings, "scale", 2.0) if call == 2 else None


@changing
def key_of_a_dict_that_is_missing_by_now(patch: pytest.MonkeyPatch) -> Any:
    table = {"scale": 2.0, "other": 1.0}

    def read(m: Any) -> float:
        try:
            return table["scale"]
        except KeyError:
            return table["other"]

    return scaled(read), lambda call: table.pop("scale", None) if call == 2 else None


@changing
def attribute_that_was_missing(patch: pytest.MonkeyPatch) -> Any:
    settings = types.SimpleNamespace()

    def read(m: Any) -> float:
        try:
            return settings.scale  # type: ignore[no-any-return]
        except AttributeError:
            return 1.0

    return scaled(read), lambda call: setattr(settings, "scale", 2.0) if call == 2 else None


@changing
def attribute_whose_lack_a_context_manager_hides(patch: pytest.MonkeyPatch) -> Any:
    settings = types.SimpleNamespace()

    @contextmanager
    def hiding() -> Iterator[None]:
        try:
            yield
        except AttributeError as error:
            del error

    def read(m: Any) -> float:
        scale = other = 1.0
        with hiding():
            scale = settings.scale
        with suppress(AttributeError):
            other = settings.other
        return scale * other

    def change(call: int) -> None:
        if call in (2, 4):
            setattr(settings, "scale" if call == 2 else "other", 2.0)

    return scaled(read), change


@changing
def key_that_is_matched(patch: pytest.MonkeyPatch) -> Any:
    table: dict[str, float] = {}

    def read(m: Any) -> float:
        match table:
            case {"scale": scale}:
                return scale
        return 1.0

    return scaled(read), lambda call: table.update(scale=2.0) if call == 2 else None


@changing
def variable_that_the_environment_lacked(patch: pytest.MonkeyPatch) -> Any:
    patch.delenv("SCALE_OF_A_TEST", raising=False)
    model = scaled(lambda m: float(os.environ.get("SCALE_OF_A_TEST", "1")))
    return model, lambda call: call == 2 and patch.setenv("SCALE_OF_A_TEST", "2")


@changing
def name_that_a_module_lacked(patch: pytest.MonkeyPatch) -> Any:
    settings = types.ModuleType("settings")
    return scaled(lambda m: getattr(settings, "scale", 1.0)), lambda call: call == 2 and setattr(settings, "scale", 2.0)


@changing
def name_that_a_module_lacked_and_a_branch_asks_for(patch: pytest.MonkeyPatch) -> Any:
    settings = types.ModuleType("settings")
    model: Any = scaled(lambda m: getattr(settings, "wide", 1.0) if m.is_wide else getattr(settings, "scale", 1.0))

    def change(call: int) -> None:
        model.is_wide = call > 1
        if call == 4:
            settings.wide = 2.0  # type: ignore[attr-defined]

    return model, change


@changing
def attribute_that_was_computed(patch: pytest.MonkeyPatch) -> Any:
    class Computed:
        def __getattr__(self, name: str) -> float:
            return 1.0

    settings: Any = Computed()
    return scaled(lambda m: settings.scale), lambda call: call == 2 and setattr(settings, "scale", 2.0)


@changing
def attribute_hidden_by_that_of_a_class_between(patch: pytest.MonkeyPatch) -> Any:
    class Base(Net):
        scale = 1.0

    class Own(Base):
        pass

    model = Own(lambda m, x: m.last(torch.tanh(m.first(x)) * m.scale), **layers())
    return model, lambda call: call == 2 and setattr(Own, "scale", 2.0)


@changing
def attribute_of_the_class_of_another_object(patch: pytest.MonkeyPatch) -> Any:
    class Base:
        scale = 1.0

    class Own(Base):
        pass

    settings = Own()
    return scaled(lambda m: settings.scale), lambda call: call == 2 and setattr(Own, "scale", 2.0)


@changing
def method_of_a_class_of_pytorch(patch: pytest.MonkeyPatch) -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.last(m.first(x.unsqueeze(1)).flatten(1))  # type: ignore[no-any-return]

    def twice(m: Any, *args: Any) -> Tensor:
        return ordinary(m, *args) * 2

    ordinary = nn.Conv1d._conv_forward
    model = Net(forward, first=nn.Conv1d(1, 2, 3), last=nn.Linear(4, 3))
    return model, lambda call: call == 2 and patch.setattr(nn.Conv1d, "_conv_forward", twice)


@changing
def instance_of_an_abstract_class(patch: pytest.MonkeyPatch) -> Any:
    class Large(ABC):  # noqa: B024
        pass

    class Own:
        pass

    own = Own()
    return scaled(lambda m: 2.0 if isinstance(own, Large) else 1.0), lambda call: call == 2 and Large.register(Own)


@changing
def environment(patch: pytest.MonkeyPatch) -> Any:
    patch.setenv("SCALE_OF_A_TEST", "1")
    model = scaled(lambda m: float(os.environ["SCALE_OF_A_TEST"]))
    return model, lambda call: patch.setenv("SCALE_OF_A_TEST", str(call))


@changing
def buffer_in_place(patch: pytest.MonkeyPatch) -> Any:
    model = Net(lambda m, x: m.last(torch.tanh(m.first(x)) * m.scale), scale=torch.ones(5), **layers())
    return model, lambda call: model.scale.add_(1)


@changing
def buffer_replaced(patch: pytest.MonkeyPatch) -> Any:
    model = Net(lambda m, x: m.last(torch.tanh(m.first(x)) * m.scale), scale=torch.ones(5), **layers())
    return model, lambda call: setattr(model, "scale", torch.full((5,), 1.0 + call, dtype=torch.float64))


@changing
def indices_in_a_buffer(patch: pytest.MonkeyPatch) -> Any:
    model = Net(lambda m, x: m.last(m.first(x) + m.table(m.ids).sum(0)), table=nn.Embedding(6, 5),
                ids=torch.tensor([0, 1, 2]), **layers())  # fmt: skip
    values = [[0, 1, 2], [0, 1, 2], [1, 1, 1], [5, 5, 0], [3, 2, 1], [0, 0, 0]]
    return model, lambda call: model.ids.copy_(torch.tensor(values[call]))


@changing
def indices_replaced(patch: pytest.MonkeyPatch) -> Any:
    model = Net(lambda m, x: m.last(m.first(x) + m.weight[m.ids].sum(0)), weight=nn.Parameter(torch.randn(6, 5)),
                ids=torch.tensor([0, 1, 2]), **layers())  # fmt: skip
    values = [[0, 1, 2], [0, 1, 2], [1, 1, 1], [5, 5, 0], [3, 2, 1], [0, 0, 0]]
    return model, lambda call: setattr(model, "ids", torch.tensor(values[call]))


@changing
def parameter_in_place(patch: pytest.MonkeyPatch) -> Any:
    model = scaled(lambda m: 1.0)
    return model, lambda call: [p.data.mul_(1.5) for p in model.parameters()]


@changing
def parameter_memory(patch: pytest.MonkeyPatch) -> Any:
    model = scaled(lambda m: 1.0)
    return model, lambda call: [setattr(p, "data", torch.randn_like(p)) for p in model.parameters()]


@changing
def parameter_strides(patch: pytest.MonkeyPatch) -> Any:
    model = scaled(lambda m: 1.0)
    return model, lambda call: setattr(model.first.weight, "data", model.first.weight.data.mT.contiguous().mT)


@changing
def parameter_replaced(patch: pytest.MonkeyPatch) -> Any:
    model = scaled(lambda m: 1.0)
    return model, lambda call: setattr(model.first, "weight", nn.Parameter(torch.randn(5, 4, dtype=torch.float64)))


@changing
def parameters_exchanged(patch: pytest.MonkeyPatch) -> Any:
    torch.manual_seed(0)
    model: Any = Net(lambda m, x: m.last(torch.tanh(m.a(torch.tanh(m.b(x))))), a=nn.Linear(4, 4), b=nn.Linear(4, 4),
                     last=nn.Linear(4, 3))  # fmt: skip

    def change(call: int) -> None:
        if call > 1:
            model.a.weight, model.b.weight = model.b.weight, model.a.weight

    return model, change


@changing
def parameters_tied(patch: pytest.MonkeyPatch) -> Any:
    torch.manual_seed(0)
    model: Any = Net(lambda m, x: m.last(torch.tanh(m.a(torch.tanh(m.b(x))))), a=nn.Linear(4, 4), b=nn.Linear(4, 4),
                     last=nn.Linear(4, 3))  # fmt: skip
    own = model.b.weight

    def change(call: int) -> None:
        model.b.weight = model.a.weight if call in (2, 3) else own

    return model, change


@changing
def parameter_frozen(patch: pytest.MonkeyPatch) -> Any:
    model = scaled(lambda m: 1.0)
    return model, lambda call: model.first.weight.requires_grad_(call % 3 != 2)


@changing
def module_replaced(patch: pytest.MonkeyPatch) -> Any:
    model = scaled(lambda m: 1.0)
    return model, lambda call: setattr(model, "first", nn.Linear(4, 5, bias=call % 2 == 0).double())


@changing
def module_forward_replaced(patch: pytest.MonkeyPatch) -> Any:
    model = scaled(lambda m: 1.0)

    def change(call: int) -> None:
        def forward(layer: Any, x: Tensor) -> Tensor:
            return nn.Linear.forward(layer, x) * (1.0 + call)

        model.first.forward = types.MethodType(forward, model.first)  # type: ignore[union-attr]

    return model, change


@changing
def forward_hook_added(patch: pytest.MonkeyPatch) -> Any:
    model = scaled(lambda m: 1.0)

    def change(call: int) -> None:
        if call in (2, 4):
            model.first.register_forward_hook(lambda module, args, output: output * (1.0 + call))

    return model, change


@changing
def forward_hook_replaced(patch: pytest.MonkeyPatch) -> Any:
    model = scaled(lambda m: 1.0)
    handles: list[Any] = []

    def change(call: int) -> None:
        for handle in handles:
            handle.remove()
        handles[:] = [model.first.register_forward_hook(lambda module, args, output: output * (1.0 + call))]

    return model, change


@changing
def global_forward_hook(patch: pytest.MonkeyPatch) -> Any:
    model = scaled(lambda m: 1.0)
    handles: list[Any] = []

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return output * 2.0 if isinstance(module, nn.Linear) else None

    def change(call: int) -> None:
        if call == 2:
            handles.append(nn.modules.module.register_module_forward_hook(hook))
        if call == 4:
            handles.pop().remove()

    return model, change


@changing
def gradient_scaled_by_a_hook_of_the_forward_pass(patch: pytest.MonkeyPatch) -> Any:
    class Own(nn.Module):
        scale = 1.0

        def __init__(self) -> None:
            super().__init__()
            for name, layer in layers().items():
                setattr(self, name, layer)

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = torch.tanh(self.first(x))
            if h.requires_grad:
                h.register_hook(lambda g: g * self.scale)
            y: Tensor = self.last(h)
            return y

    model = Own()
    return model, lambda call: setattr(model, "scale", 1.0 + call)


@changing
def backward_hook(patch: pytest.MonkeyPatch) -> Any:
    model = scaled(lambda m: 1.0)

    def change(call: int) -> None:
        if call == 2:
            model.first.register_full_backward_hook(lambda module, inputs, outputs: None)

    return model, change


@changing
def loss_of_the_values(patch: pytest.MonkeyPatch) -> Any:
    def decide(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.first(x))
        return m.last(h if m.first.weight.sum() > 0 else h.sin())  # type: ignore[no-any-return]

    model = Net(decide, **layers())
    return model, lambda call: model.first.weight.data.mul_(-1)


@changing
def number_of_a_tensor(patch: pytest.MonkeyPatch) -> Any:
    model = Net(lambda m, x: m.last(torch.tanh(m.first(x)) * m.scale.item()), scale=torch.ones(()), **layers())
    return model, lambda call: model.scale.add_(1)


@changing
def rows_chosen_by_value(patch: pytest.MonkeyPatch) -> Any:
    model = Net(lambda m, x: m.last(torch.tanh(m.first(x)) * m.factors[m.factors > 0].sum()),
                factors=torch.tensor([1.0, -1.0, 2.0]), **layers())  # fmt: skip
    return model, lambda call: model.factors.add_(0.7)


@changing
def default_dtype(patch: pytest.MonkeyPatch) -> Any:
    model = scaled(lambda m: torch.tensor(0.1).double())
    return model, lambda call: torch.set_default_dtype(torch.float64 if call in (2, 3) else torch.float32)


@changing
def gradient_mode_inside(patch: pytest.MonkeyPatch) -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(m.learns):
            h = torch.tanh(m.first(x))
        return m.last(h)  # type: ignore[no-any-return]

    model = Net(forward, **layers())
    return model, lambda call: setattr(model, "learns", call % 2 == 0)


@changing
def training_mode(patch: pytest.MonkeyPatch) -> Any:
    model = Net(lambda m, x: m.last(F.dropout(torch.tanh(m.first(x)), 0.5, m.training)), **layers())
    return model, lambda call: model.train(call % 3 != 2)


@changing
def number_of_threads(patch: pytest.MonkeyPatch) -> Any:
    return scaled(lambda m: 1.0), lambda call: torch.set_num_threads(1 + call % 2)


@changing
def dynamo_reset(patch: pytest.MonkeyPatch) -> Any:
    return attribute("scale", [1.0, 1.0, 2.0, 3.0, 3.0, 4.0])[0], lambda call: torch._dynamo.reset()


def test_dynamo_is_reset() -> None:
    model = scaled(lambda m: m.scale)

    def change(call: int) -> None:
        model.scale = 1.0 + call // 3
        torch._dynamo.reset()

    follow(model, change)


CHANGES.pop("dynamo_reset")


CHECKED = ["float_attribute", "indices_replaced", "parameters_tied", "forward_hook_added", "training_mode"]


@pytest.mark.parametrize(("name", "check"), [(n, "never") for n in CHANGES] + [(n, "first") for n in CHECKED])
def test_what_changes_between_calls_is_seen(name: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, change = CHANGES[name](monkeypatch)
    try:
        try:
            follow(model, change, check=check)
        except PersampleError:
            # Refused by the ordinary way, too.
            model, change = CHANGES[name](monkeypatch)
            with pytest.raises(PersampleError):
                ordinary(model, change, check)
    finally:
        torch.set_default_dtype(torch.float32)
        nn.modules.module._global_forward_hooks.clear()


def ordinary(model: nn.Module, change: Callable[[int], object], check: Any) -> None:
    source = persample.make_source("fused", model.double(), loss_fn, check=check)
    for call in range(6):
        change(call)
        source.moments(*data(seed=call))


def test_counters_beside_what_a_model_reads_are_no_hindrance() -> None:
    class Own(Net):
        steps = 0

    settings = types.SimpleNamespace(scale=2.0, steps=0)
    model = Own(lambda m, x: m.last(torch.tanh(m.first(x)) * settings.scale), **layers())

    def count(call: int) -> None:
        Own.steps = settings.steps = call
        settings.last = call

    assert follow(model, count) == ["replayed"] * 6


def test_where_a_missing_attribute_is_caught_the_reason_says_so() -> None:
    model, _ = CHANGES["attribute_that_was_missing"](pytest.MonkeyPatch())
    source = source_of(model.double(), check="never")
    source.moments(*data())
    assert source.ran_because.startswith("the model catches an error (test_replay.py:")


def test_where_activations_are_computed_again_the_reason_says_so() -> None:
    model = Net(lambda m, x: m.last(checkpoint(lambda h: m.first(h).tanh(), x, use_reentrant=False)), **layers())
    source = source_of(model.double(), check="never")
    source.moments(*data())
    assert "higher-order operation (tag_activation_checkpoint)" in source.ran_because


def test_errors_that_are_raised_and_caught_are_no_hindrance() -> None:
    settings = types.SimpleNamespace(scale=1.0)

    def read(m: Any) -> float:
        try:
            if settings.scale > 1:
                raise ValueError
        except ValueError:
            return 2.0
        return 3.0

    assert follow(scaled(read), lambda call: setattr(settings, "scale", 1.0 + call % 2)) == ["replayed"] * 6


@pytest.mark.parametrize("name", ["tensor_made_of_an_attribute", "tensor_made_of_sizes"])
def test_tensors_made_of_python_numbers_are_replayed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "eager" not in follow(*CHANGES[name](monkeypatch))


OUTSIDE: dict[str, int] = {}
LIST: list[int] = []


@pytest.mark.parametrize("kind", ["dict", "list"])
def test_what_the_forward_pass_counts_outside_of_the_model_is_counted_once(kind: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        if kind == "dict":
            OUTSIDE["calls"] += 1
        else:
            LIST.append(1)
        return m.last(torch.tanh(m.first(x)))  # type: ignore[no-any-return]

    OUTSIDE["calls"] = 0
    LIST.clear()
    source = source_of(Net(forward, **layers()).double(), check="never")
    for call in range(12):
        source.moments(*data(seed=call))
        assert (OUTSIDE["calls"] if kind == "dict" else len(LIST)) == call + 1


def test_a_model_that_looks_into_an_ordered_dict_is_recorded_anew_for_each_order() -> None:
    table = OrderedDict(a=1.0, b=2.0)
    model = scaled(lambda m: sum(n * v for n, v in enumerate(table.values())))
    assert follow(model, lambda call: table.move_to_end("a" if call % 2 else "b")) == ["replayed"] * 6


def test_a_model_that_enters_a_context_manager_is_recorded() -> None:
    """As adapters of peft do, which hook into modules for one forward pass."""
    settings = types.SimpleNamespace(scale=1.0)

    @contextmanager
    def scaling(m: Any) -> Iterator[None]:
        before, m.scale = m.scale, settings.scale
        try:
            yield
        finally:
            m.scale = before

    def forward(m: Any, x: Tensor) -> Tensor:
        with scaling(m):
            return m.last(torch.tanh(m.first(x)) * m.scale)  # type: ignore[no-any-return]

    model = Net(forward, **layers())
    model.scale = 3.0
    assert follow(model, lambda call: setattr(settings, "scale", 1.0 + call // 2)) == ["replayed"] * 6
    assert model.scale == 3.0


def test_a_model_that_looks_up_a_missing_key_is_recorded() -> None:
    tables: list[Any] = [{"a": 1.0}, UserDict(a=1.0)]

    def read(m: Any) -> float:
        total = 1.0
        for table in tables:
            try:
                total += table["b"]
            except KeyError:
                total *= 2
        return total * Mapping.get(tables[1], "b", 3.0)  # type: ignore[no-any-return]

    def change(call: int) -> None:
        if call in (2, 4):
            tables[call // 2 - 1]["b"] = 5.0

    assert follow(scaled(read), change) == ["replayed"] * 6


@pytest.mark.parametrize("where", ["argument", "inside of an argument", "keyword arguments", "targets"])
def test_a_key_that_comes_into_an_argument_is_seen(where: str) -> None:
    def doubled_or_scaled(h: Tensor, given: Any) -> Tensor:
        try:
            return h * given["scale"]  # type: ignore[no-any-return]
        except KeyError:
            return 2 * h

    def forward(m: Any, *args: Any, **kwargs: Any) -> Tensor:
        given = kwargs if kwargs else args[0] if where == "argument" else args[0]["inner"]
        h = m.last(torch.tanh(m.first(given["x"])))
        return h if where == "targets" else doubled_or_scaled(h, given)

    def loss(outputs: Tensor, targets: Any) -> Tensor:
        if where == "targets":
            outputs, targets = doubled_or_scaled(outputs, targets), targets["y"]
        return (outputs - targets).square().sum(1)  # type: ignore[no-any-return]

    model, ran = Net(forward, **layers()).double(), []
    source, plain = source_of(model, loss), persample.make_source("fused", model, loss, compile=False)
    for call in range(6):
        x, y = data(seed=call)
        scale = {"scale": 3 * torch.ones(len(x), 1, dtype=x.dtype)} if call % 3 == 2 else {}
        given = {"x": x, **({} if where == "targets" else scale)}
        inputs = given if where == "keyword arguments" else (given,) if where == "argument" else ({"inner": given},)
        targets = {"y": y, **scale} if where == "targets" else y
        require_right(source.moments(inputs, targets), plain.moments(inputs, targets))
        ran.append(source.ran)
    assert (ran == ["replayed"] * 6) == (where == "keyword arguments"), source.ran_because


def test_a_change_in_the_loss_is_seen() -> None:
    power = 2.0

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).abs().pow(power).sum(1)

    def change(call: int) -> None:
        nonlocal power
        power = 2.0 + call // 2

    ran = follow(scaled(lambda m: 1.0), change, loss=loss)
    assert ran == ["replayed"] * 6


def test_a_loss_module_is_replayed_with_the_settings_that_it_has_by_now() -> None:
    model, module = scaled(lambda m: 1.0).double(), nn.CrossEntropyLoss(torch.rand(3, dtype=torch.float64))
    source = persample.make_source("fused", model, module, compile=True)
    expected = persample.make_source("loop", model, module)
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    for call in range(6):
        if call == 2:
            module.label_smoothing = 0.2
        if call == 3:
            module.weight = torch.rand(3, dtype=torch.float64)
        if call == 4:
            module.ignore_index = 1
        if call == 5:
            module.register_forward_hook(lambda module, args, output: output * 2)
        x, _ = data(seed=call)
        require_right(source.moments(x, targets), expected.moments(x, targets))
        assert source.ran == ("replayed" if call < 5 else "eager")


def test_a_value_that_changes_in_every_call_is_exact_beyond_the_limit_of_graphs() -> None:
    model = scaled(lambda m: m.scale)
    ran = follow(model, lambda call: setattr(model, "scale", 1.0 + call), calls=12)
    assert ran[0] == "replayed"
    assert ran[-1] == "eager"


# State, and random numbers.


def counted(m: Any, x: Tensor) -> Tensor:
    m.calls += 1
    return m.last(torch.tanh(m.first(x)) * m.calls)  # type: ignore[no-any-return]


@pytest.mark.parametrize("start", [0, torch.zeros((), dtype=torch.float64)], ids=["number", "tensor"])
@pytest.mark.parametrize("check", ["never", "first"])
def test_what_the_forward_pass_counts_goes_on_by_one(start: Any, check: str) -> None:
    model = Net(counted, **layers()).double()
    if isinstance(start, Tensor):
        model.register_buffer("calls", start.clone())
    else:
        model.calls = start
    source = source_of(model, check=check)
    for call in range(12):
        x, y = data(seed=call)
        source.moments(x, y)
        assert int(model.calls) == call + 1


@pytest.mark.parametrize("start", [0, torch.zeros((), dtype=torch.float64)], ids=["number", "tensor"])
def test_what_the_forward_pass_counts_takes_part(start: Any) -> None:
    model = Net(counted, **layers())
    if isinstance(start, Tensor):
        model.register_buffer("calls", start.clone())
    else:
        model.calls = start
    follow(model, lambda call: None, calls=12)


def test_the_tensor_that_the_forward_pass_keeps_is_that_of_the_last_batch() -> None:
    def keeping(m: Any, x: Tensor) -> Tensor:
        m.seen = torch.tanh(m.first(x))
        return m.last(m.seen)  # type: ignore[no-any-return]

    model: Any = Net(keeping, **layers()).double()
    source = source_of(model, check="never")
    for call in range(4):
        x, y = data(seed=call)
        source.moments(x, y)
        torch.testing.assert_close(model.seen, torch.tanh(model.first(x)))
        assert not model.seen.requires_grad


def noise(kind: str) -> nn.Module:
    generator = generator_of(3)
    own = np.random.default_rng(3)
    draws: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "dropout": lambda m, h: F.dropout(h, 0.5),
        "noise": lambda m, h: h + torch.randn_like(h),
        "unused": lambda m, h: (torch.rand(3), h)[1],
        "python": lambda m, h: h * random.random(),
        "python choice": lambda m, h: h.sin() if random.random() < 0.5 else h.cos(),
        "numpy": lambda m, h: h * float(np.random.rand()),
        "numpy tensor": lambda m, h: h * torch.from_numpy(np.random.rand(5)).to(h.device),
        "generator": lambda m, h: h * torch.rand(h.shape, generator=m.generator, dtype=h.dtype),
        "numpy generator": lambda m, h: h * m.own.random(),
        "seeded": lambda m, h: (torch.manual_seed(5), h + torch.randn_like(h))[1],
        "rreLU": lambda m, h: F.rrelu(h, training=True),
        "bernoulli": lambda m, h: h * torch.bernoulli(torch.full_like(h, 0.3)),
        "dropout without effect": lambda m, h: F.dropout(h, 0.0),
    }
    model: Any = Net(lambda m, x: m.last(draws[kind](m, torch.tanh(m.first(x)))), **layers()).double()
    model.generator, model.own = generator, own
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["dropout", "noise", "unused", "python", "python choice", "numpy", "numpy tensor",
                                  "seeded", "rreLU", "bernoulli", "dropout without effect", "generator",
                                  "numpy generator"])  # fmt: skip
@pytest.mark.parametrize("check", ["never", "first"])
def test_random_numbers_are_those_of_the_ordinary_way(kind: str, check: Any) -> None:
    found, after = [], []
    for options in ({}, {"compile": True}):
        source = persample.make_source("fused", noise(kind), loss_fn, check=check, **options)
        torch.manual_seed(4)
        random.seed(4)
        np.random.seed(4)
        found.append([source.moments(*data(seed=call)) for call in range(5)])
        own: Any = source.model.generator
        after.append((torch.rand(1).item(), random.random(), np.random.rand(), own.get_state().sum().item()))
    for a, b in zip(*found, strict=True):
        require_right(b, a)
    assert after[0] == after[1]
    if kind in ("dropout", "noise"):
        assert source.ran == "replayed"
        assert not torch.equal(found[1][1].losses, found[1][2].losses)


def test_dropout_is_that_of_an_ordinary_pass_from_the_same_seed() -> None:
    model = noise("dropout")
    source = source_of(model, check="never")
    for call in range(4):
        x, y = data(seed=call)
        torch.manual_seed(call)
        expected = truth(model, x, y)
        torch.manual_seed(call)
        require_right(source.moments(x, y), expected)
    assert source.ran == "replayed"


# Batches.


def test_uneven_batches_and_other_dtypes_and_layouts() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)).double()
    source = source_of(model, check="never")
    for call in range(3):
        for size in (5, 5, 3, 2, 1):
            x = torch.randn(size, 2, 6, 6, dtype=torch.float64)
            y = torch.randn(size, 3, dtype=torch.float64)
            for given in (x, x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT):
                require_right(source.moments(given, y), truth(model, given, y))
        model.to(memory_format=torch.channels_last if call == 0 else torch.contiguous_format)


def test_beyond_the_limit_of_graphs_those_that_are_there_still_serve() -> None:
    model = scaled(lambda m: 1.0).double()
    source = source_of(model, check="never")
    ran = {}
    for size in [*range(2, 14), *range(2, 14)]:
        x, y = data(size)
        require_right(source.moments(x, y), truth(model, x, y))
        ran[size] = source.ran
    assert ran[2] == ran[5] == "replayed"
    assert ran[13] == "eager"
    assert source.ran_because


def test_a_batch_that_fails_once_leaves_the_others_replayed() -> None:
    model = scaled(lambda m: 1.0).double()
    source = source_of(model, lambda outputs, targets: (outputs - targets[:, :3]).square().sum(1), check="never")
    x, y = data()
    source.moments(x, y)
    both = torch.cat([x, y], 1)
    for given in ((x, y), (both[:, :4], both), (x, y)):
        require_right(source.moments(*given), truth(model, *given, source.loss_fn))
    assert source.ran == "replayed"


def test_tensors_that_share_memory() -> None:
    model = scaled(lambda m: 1.0).double()
    own = Net(lambda m, x: m.last(torch.tanh(m.first(x.add_(1)))), **layers()).double()
    for net in (model, own):
        source = source_of(net, lambda outputs, targets: (outputs - targets[:, :3]).square().sum(1), check="never")
        both = torch.randn(6, 8, dtype=torch.float64)
        pairs = [(both[:, :4].clone(), both[:, 4:].clone()), (both[:, :4], both[:, 4:]), (both[:, :4], both[:, :4])]
        for x, y in pairs * 2:
            kept = x.clone(), y.clone()
            ordinary = persample.make_source("fused", net, source.loss_fn, check="never")
            try:
                expected = ordinary.moments(x, y)
            except PersampleError:
                x.copy_(kept[0])
                with pytest.raises(PersampleError):
                    source.moments(x, y)
            else:
                changed = x.clone()
                x.copy_(kept[0]), y.copy_(kept[1])
                require_right(source.moments(x, y), expected)
                assert torch.equal(x, changed)
            x.copy_(kept[0]), y.copy_(kept[1])


def test_a_default_device_is_no_hindrance_and_another_mode_is() -> None:
    class Watching(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    model = Net(lambda m, x: m.last(torch.tanh(m.first(x)) + torch.arange(5)), **layers()).double()
    source, ran = source_of(model), []
    for call in range(6):
        x, y = data(seed=call)
        with Watching() if call == 4 else torch.device(x.device) if call in (1, 2) else nullcontext():
            found = source.moments(x, y)
        require_right(found, truth(model, x, y))
        ran.append(source.ran)
    assert ran == ["replayed"] * 4 + ["eager", "replayed"]


def test_python_values_among_the_arguments() -> None:
    def forward(m: Any, x: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> Tensor:
        h = torch.tanh(m.first(x)) * scale
        return m.last(h if mask is None else h * mask)  # type: ignore[no-any-return]

    model = Net(forward, **layers()).double()
    source, plain = source_of(model), persample.make_source("fused", model, loss_fn)
    x, y = data()
    mask = torch.rand(6, 5, dtype=torch.float64)
    masked = {"x": x, "mask": mask}, {"x": x, "mask": None}, (x, 2.0, mask)
    for inputs in [(x,), (x, 2.0), (x, 3), *masked, (x, 5.0)] * 2:
        require_right(source.moments(inputs, y), plain.moments(inputs, y))


def test_autocast_and_half_precision() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    source, plain = source_of(model), persample.make_source("fused", model, loss_fn)
    x, y = (t.float() for t in data())
    for enabled in (True, False, True, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            require_right(source.moments(x, y), plain.moments(x, y), 0)
            assert source.ran == "replayed"
            assert torch.is_autocast_enabled("cpu") == enabled
    model.bfloat16()
    for _ in range(3):
        require_right(source.moments(x.bfloat16(), y.bfloat16()), plain.moments(x.bfloat16(), y.bfloat16()), 0)


# Errors.


def test_errors_are_those_of_the_ordinary_way_and_leave_no_trace() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.calls.add_(1)
        if m.fails:
            raise ValueError("on purpose")
        return m.last(torch.tanh(m.first(x)))  # type: ignore[no-any-return]

    model: Any = Net(forward, calls=torch.zeros(()), **layers()).double()
    source = source_of(model, persample.losses.cross_entropy)
    x, y = data()[0], torch.tensor([0, 1, 2, 0, 1, 2])
    for call in range(8):
        model.fails = call in (2, 5)
        if model.fails:
            with pytest.raises(ValueError, match="on purpose"):
                source.moments(x, y)
        else:
            expected = truth(model, x, y, persample.losses.cross_entropy)
            require_right(source.moments(x, y), expected)
    assert model.calls == 6
    model.fails = False
    with pytest.raises(Exception, match=r"out of bounds|class"):
        source.moments(x, y + 7)
    assert model.calls == 6
    with pytest.raises(persample.errors.NonFiniteLossError):
        source.moments(x * float("nan"), y)
    assert model.calls == 6
    require_right(source.moments(x, y), truth(model, x, y, persample.losses.cross_entropy))


def test_it_works_where_dynamo_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model = scaled(lambda m: 1.0).double()
    source = source_of(model)
    x, y = data()
    with torch.compiler.set_stance("force_eager"):
        require_right(source.moments(x, y), truth(model, x, y))
    for disabled in (False, True, False):
        with torch._dynamo.config.patch(disable=disabled):
            require_right(source.moments(x, y), truth(model, x, y))


def test_a_model_that_asks_whether_it_is_compiled() -> None:
    model = scaled(lambda m: 2.0 if torch.compiler.is_compiling() else 1.0)
    assert set(follow(model, lambda call: None)) == {"eager"}


def test_compiled_parts_of_the_model() -> None:
    model = scaled(lambda m: 1.0)
    model.first.compile(backend="eager")
    follow(model, lambda call: None)


def test_custom_functions_of_autograd() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * SETTINGS["scale"]

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * SETTINGS["scale"]

    model = Net(lambda m, x: m.last(Twice.apply(torch.tanh(m.first(x)))), **layers())
    follow(model, lambda call: SETTINGS.update(scale=1.0 + call))


def test_models_that_talk_to_other_processes(tmp_path: Path) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        total = torch.ones(5, dtype=x.dtype)
        torch.distributed.all_reduce(total)
        return m.last(torch.tanh(m.first(x)) * total)  # type: ignore[no-any-return]

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        source = source_of(Net(forward, **layers()).double(), check="never")
        source.moments(*data())
        assert source.ran == "eager"
        assert "other processes" in source.ran_because
    finally:
        torch.distributed.destroy_process_group()


# The rest of the world.


def test_nothing_of_it_is_copied_or_pickled_or_kept_alive() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).double()
    source = source_of(model)
    x, y = data()
    for _ in range(3):
        expected = source.moments(x, y)
    assert source.ran == "replayed"
    for twin in (copy.deepcopy(source), pickle.loads(pickle.dumps(source)), copy.copy(source)):
        twin.model[0].bias.data += 1
        require_right(twin.moments(x, y), truth(twin.model, x, y))
        require_right(twin.moments(x, y), truth(twin.model, x, y))
        twin.model[0].bias.data -= 1
        require_right(source.moments(x, y), expected)
    other = copy.copy(source)
    other.model = copy.deepcopy(model)
    other.model[0].bias.data += 1  # type: ignore[index]
    require_right(other.moments(x, y), truth(other.model, x, y))
    require_right(source.moments(x, y), expected)
    gone = weakref.ref(model), weakref.ref(source)
    del model, source, twin, other
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert not any(type(thing) is graph.Recording for thing in gc.get_objects())


def test_no_trace_is_left_on_the_tensors_of_the_model() -> None:
    parts = layers() | {"frozen": nn.Linear(3, 3).requires_grad_(False), "norm": nn.BatchNorm1d(5)}
    scale = torch.tensor([1.0, 2.0, 3.0])  # neither parameter nor buffer
    shift, loss_scale = torch.ones(3), torch.ones(1)
    model: Any = Net(lambda m, x: m.frozen(m.last(m.norm(m.first(x)))) * scale + m.shift, shift=shift, **parts)
    model.double().eval()
    marked = model.norm.running_mean
    marked.note = "the user's own"
    x, y = data()
    environment = dict(os.environ)
    with no_trace(model, x, y, scale, loss_scale):
        source = source_of(model, lambda outputs, targets: loss_fn(outputs * loss_scale, targets))
        for _ in range(3):
            source.moments(x, y)
    assert source.ran == "replayed"
    assert vars(marked) == {"note": "the user's own"}
    assert dict(os.environ) == environment


def test_no_variable_is_left_in_the_environment() -> None:
    """Dynamo sets one when it is imported, here by a process that has not."""
    record = """
        import os, torch, persample
        before = dict(os.environ)
        source = persample.make_source("fused", torch.nn.Linear(4, 3), torch.nn.MSELoss(), compile=True)
        for _ in range(3):
            source.moments(torch.randn(5, 4), torch.randn(5, 3))
        assert source.ran == "replayed", source.ran_because
        assert dict(os.environ) == before
        """
    subprocess.run([sys.executable, "-c", textwrap.dedent(record)], check=True, timeout=180)


TRACED = ["LSTM", "BatchNorm1d in eval mode", "Embedding tied to a linear layer", "Orthogonal weight",
          "TransformerEncoderLayer, norm last, batch first, in training mode", "Layer chosen by value"]  # fmt: skip


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.filterwarnings("error")
def test_no_trace_is_left_anywhere(name: str) -> None:
    problem = ZOO[name].problem(4)
    source = persample.make_source("fused", problem.model, problem.loss_fn, compile=True)
    before = around()
    with no_trace(problem.model, problem.inputs, problem.targets):
        for _ in range(3):
            source.moments(problem.inputs, problem.targets)
            source.compute(problem.inputs, problem.targets, Norms(), Gram())
    assert around() == before


def around() -> Any:
    """What processes, threads and other packages see of PyTorch's settings and Python's."""
    return (
        torch._dynamo.config.get_config_copy(),  # type: ignore[attr-defined]
        torch._dynamo.eval_frame._stance,
        torch._C._dynamo.eval_frame.get_eval_frame_callback(),
        dict(os.environ),
        [*warnings.filters],
        {name: logger.level for name, logger in logging.root.manager.loggerDict.items() if hasattr(logger, "level")},
        [thread.name for thread in threading.enumerate()],
        (torch.is_autocast_enabled("cpu"), torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()),
        (sys.gettrace(), sys.getprofile(), gc.isenabled()),
    )


def test_an_optimizer_has_it_by_an_option_and_nothing_of_it_in_its_state() -> None:
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        optimizer = persample.VOGN(model, persample.losses.cross_entropy, data_size=60, backend="fused",
                                   backend_options={"compile": compiled, "deterministic": True})  # fmt: skip
        optimizer.mc_samples = 2
        for call in range(4):
            optimizer.observe(data(seed=call)[0], torch.tensor([0, 1, 2, 0, 1, 2]))
            optimizer.step()
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        pickle.dumps(optimizer.state_dict())
        copy.deepcopy(optimizer)
    assert optimizer.source.ran == "replayed"
    assert torch.equal(*runs)


def test_threads_with_sources_of_their_own_or_one_for_all() -> None:
    shared = scaled(lambda m: 1.0).double()
    one = source_of(shared)
    wrong: list[BaseException] = []

    def run(number: int) -> None:
        try:
            model = copy.deepcopy(shared)
            model.first.weight.data += number  # type: ignore[operator,union-attr]
            own = source_of(model)
            for call in range(4):
                x, y = data(seed=10 * number + call)
                require_right(own.moments(x, y), truth(model, x, y))
                require_right(one.moments(x, y), truth(shared, x, y))
        except BaseException as error:  # noqa: BLE001 - told by the main thread
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_explain_and_the_log_say_why(caplog: pytest.LogCaptureFixture) -> None:
    model = scaled(lambda m: 2.0 if m.first.weight.sum() > 0 else 1.0).double()
    source = source_of(model)
    for _ in range(3):
        source.moments(*data())
    assert source.ran == "eager"
    assert "ata-dependent" in source.ran_because
    said = [record.getMessage() for record in caplog.records if record.name.startswith("persample")]
    assert len(said) == 1
    assert "ata-dependent" in said[0]
    explained = str(persample.explain(model, *data(), loss_fn, backend="fused", compile=True))
    assert "eager, because: " in explained
    assert "ata-dependent" in explained
    assert "test_replay.py:" in explained
    assert "(replayed)" in str(persample.explain(scaled(lambda m: 1.0).double(), data()[0], compile=True))


@pytest.mark.parametrize(
    ("act", "wrong", "expected"),
    [(F.relu, 0.0, "inductor"), (F.softplus, 0.0, "inductor"), (F.softplus, 1e-3, "eager")],
)
def test_what_rounds_otherwise_serves_as_far_as_last_bits_may_go(
    act: Any, wrong: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rounding(way: Any, recorded: Any, operands: Any, kept: Any) -> Any:
        def run(*operands: Tensor) -> Any:
            rounded = [t + 2e-7 if t.shape == (1, 2) else t for t in operands]
            return [result * (1 + wrong) for result in recorded.forward(*rounded)]

        return run

    monkeypatch.setattr(graph, "runner", rounding)
    model: Any = Net(lambda m, x: m.last(act(m.first(x))), first=nn.Linear(2, 1, bias=False), last=nn.Linear(1, 1))
    kept = torch.tensor([[1.0, -1.0]])  # for the first sample, the ReLU stands at zero
    model.first.weight.data = kept.clone()
    source = persample.make_source("fused", model, loss_fn, compile="inductor", check="never")
    source.moments(torch.tensor([[1.0, 1.0], [2.0, 1.0], [1.0, 3.0]]), torch.ones(3, 1))
    assert source.ran == expected, source.ran_because
    assert torch.equal(model.first.weight, kept)


# Quantities.

ASKED: dict[str, Callable[[int], list[Any]]] = {
    "norms": lambda call: [Norms()],
    "norms by group": lambda call: [Norms(per={"a": ["first"], "b": ["last"]})],
    "variance and mean": lambda call: [Variance(), Mean()],
    "weights": lambda call: [WeightedSum(torch.linspace(-1, call, 6, dtype=torch.float64))],
    "clipping": lambda call: [WeightedSum(clipping(0.1 * (1 + call // 2))), Norms()],
    "other gradients": lambda call: [
        Gram(other={n: torch.full((2, *p.shape), 1.0 + call) for n, p in scaled(lambda m: 1.0).named_parameters()}),
    ],
    "all": lambda call: [SecondMoment(), PerSample(), Gram(per="parameter")],
}


@pytest.mark.parametrize("name", ASKED)
def test_quantities_are_replayed_and_exact(name: str) -> None:
    model = scaled(lambda m: 1.0).double()
    source, expected = source_of(model), persample.make_source("loop", model, loss_fn)
    for call in range(4):
        x, y = data(seed=call)
        found, due = source.compute(x, y, *ASKED[name](call)), expected.compute(x, y, *ASKED[name](call))
        assert source.ran == "replayed", source.ran_because
        for (_, _, a), (_, _, b) in zip(numbers_in(found.results), numbers_in(due.results), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.losses, due.losses)
        model.first.weight.data *= 1.1  # type: ignore[operator,union-attr]


def test_what_is_asked_for_by_a_function_of_the_user_is_asked_anew() -> None:
    model = scaled(lambda m: 1.0).double()
    source, expected = source_of(model), persample.make_source("loop", model, loss_fn)
    x, y = data()
    for power in (1.0, 2.0, 3.0):
        asked = WeightedSum(lambda norms, power=power: norms**power)
        found, due = source.compute(x, y, asked), expected.compute(x, y, asked)
        torch.testing.assert_close(found.weighted_sum.gradient, due.weighted_sum.gradient)
        assert source.ran == "eager"
        assert "function" in source.ran_because


def test_projections_draw_the_same_matrix_in_every_call() -> None:
    model = scaled(lambda m: 1.0).double()
    source, expected = source_of(model), persample.make_source("loop", model, loss_fn)
    for call in range(3):
        x, y = data(seed=call)
        torch.testing.assert_close(source.project(x, y, Projection(3)), expected.project(x, y, Projection(3)))


def test_groups_of_samples() -> None:
    model = scaled(lambda m: 1.0).double()
    source, expected = source_of(model), persample.make_source("loop", model, loss_fn)
    x, y = data()
    for groups in ([0, 0, 1, 1, 2, 2], [0, 1, 2, 0, 1, 2], [5, 5, 5, 5, 5, 5]):
        found, due = (s.compute(x, y, Norms(), groups=groups) for s in (source, expected))
        torch.testing.assert_close(found.norms, due.norms)
