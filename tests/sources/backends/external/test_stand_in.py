"""Stand-ins: they compute what the model computes, and nothing that is put on them is put on the model."""

from __future__ import annotations

import functools
import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from persample.sources.backends.external.quiet import without_warnings
from persample.sources.backends.external.stand_in import stand_in
from persample.testing import no_trace


class Holding(nn.Module):
    """Calls its layer by whatever holds it."""

    def __init__(self, hold: Any, call: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.held = hold(self.layer)
        self.by = call

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.by(self.held, x)
        return output


@pytest.mark.parametrize(
    ("hold", "call"),
    [
        (lambda layer: layer, lambda held, x: held(x)),
        (lambda layer: [layer], lambda held, x: held[0](x)),
        (lambda layer: {"a": [(layer, 1)]}, lambda held, x: held["a"][0][0](x)),
        (lambda layer: layer.__call__, lambda held, x: held(x)),
        (lambda layer: functools.partial(lambda of, x: of(x), layer), lambda held, x: held(x)),
        (lambda layer: {"a": functools.partial(layer.__call__)}, lambda held, x: held["a"](x)),
    ],
    ids=["attribute", "list", "nested", "bound method", "argument of a partial", "partial of a bound method"],
)
def test_the_layers_that_run_are_those_of_the_stand_in(hold: Any, call: Any) -> None:
    model, x = nn.Sequential(Holding(hold, call), nn.Tanh()), torch.randn(2, 3)
    called: list[nn.Module] = []
    with no_trace(model), stand_in(model) as copies:
        copy = copies[model.get_submodule("0.layer")]
        copy.register_forward_hook(lambda module, args, output: called.append(module))
        torch.testing.assert_close(copies[model](x), model(x), rtol=0, atol=0)
    assert called == [copy]


def test_lists_that_hold_themselves_and_long_ones_are_no_matter() -> None:
    model = nn.Linear(3, 2)
    model.circle, model.words = [model], {str(n): n for n in range(100_000)}  # type: ignore[assignment]
    model.circle.append(model.circle)  # type: ignore[operator, union-attr]
    with no_trace(model), stand_in(model) as copies:
        copy: Any = copies[model]
        assert copy.circle[0] is copy
        assert copy.words is model.words


@pytest.mark.parametrize("compile_", [lambda m: torch.compile(m, backend="eager"), lambda m: (m.compile(), m)[1]])
def test_compiled_models_and_parts(compile_: Any) -> None:
    for model in (compile_(nn.Sequential(nn.Linear(3, 2))), nn.Sequential(compile_(nn.Linear(3, 2)), nn.Tanh())):
        x = torch.randn(2, 3)
        called: list[str] = []
        with torch.compiler.set_stance("force_eager"), stand_in(model) as copies:
            layer = next(module for module in model.modules() if type(module) is nn.Linear)
            copies[layer].register_forward_hook(lambda *_, called=called: called.append("copy"))
            torch.testing.assert_close(copies[model](x), model(x))
        assert called == ["copy"]


def test_it_has_the_parameters_of_the_model_and_no_hooks() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    with no_trace(model), stand_in(model) as copies:
        copy = copies[model]
        pairs = zip(copy.state_dict(keep_vars=True).items(), model.state_dict(keep_vars=True).items(), strict=True)
        assert all(name == other and tensor is own for (name, tensor), (other, own) in pairs)
        copy(torch.randn(2, 3))
        copy.train()
        copy[0].register_full_backward_hook(lambda *_: None)  # type: ignore[index]
        copy.extra = 3  # type: ignore[assignment]
    assert seen == []


def test_buffers_that_the_forward_pass_binds_anew_are_the_models() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return x

    model = nn.Sequential(Counting())
    with stand_in(model) as copies:
        copies[model](torch.ones(1))
    assert model[0].calls == 1


def test_nothing_holds_it_afterwards() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    gc.disable()
    try:
        with stand_in(model) as copies:
            copy = copies[model]
            copy[0].register_forward_hook(lambda *_, held=copy: None)  # type: ignore[index]
            left = weakref.ref(copy)
        del copies, copy
        assert left() is None
    finally:
        gc.enable()


def test_left_out_warnings_do_not_make_python_forget_the_others() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        before = list(warnings.filters)
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("default")
            for _ in range(3):
                with without_warnings("left (out)"):
                    warnings.warn("left (out) always", UserWarning, stacklevel=1)
                    warnings.warn("not left out", UserWarning, stacklevel=1)
        assert [str(warning.message) for warning in shown] == ["not left out"]
        assert list(warnings.filters) == before
