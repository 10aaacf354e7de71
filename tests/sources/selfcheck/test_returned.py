"""What a backend returns against its contract is told in words by everything that asks it."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import persample
from persample.errors import ContractError, DisagreementError
from persample.moments import Moments
from persample.sources import registry
from persample.sources.backends.loop import LoopSource
from persample.sources.model.usage import Use
from persample.testing.devices import generator_of

INPUTS, TARGETS = (
    torch.randn(5, 3, generator=generator_of(0)),
    torch.tensor([0, 1, 0, 1, 1]),
)
loss_fn = persample.losses.cross_entropy
MODULE = types.ModuleType("backend_of_test_returned")


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend `own` whose class a test chooses; forgotten at the end."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.setitem(sys.modules, MODULE.__name__, MODULE)
    persample.register_backend("own", f"{MODULE.__name__}:Own")


def use_backend(**methods: Callable[..., Any]) -> None:
    """Let `own` be the loop with other methods."""
    vars(MODULE)["Own"] = type("Own", (LoopSource,), methods)


def rows(change: Callable[[Tensor, dict[str, Tensor]], Any]) -> dict[str, Callable[..., Any]]:
    """Methods that return the loop's losses and per-sample gradients with a change."""

    def compute_per_sample(self: Any, batch: Any) -> Any:
        return change(*LoopSource.compute_per_sample(self, batch))

    return {
        "compute_per_sample": compute_per_sample,
        "compute_moments": lambda self, batch: persample.PerSampleGradSource.compute_moments(self, batch),
    }


def moments(change: Callable[[Moments], Any]) -> dict[str, Callable[..., Any]]:
    """A method that returns the loop's moments with a change."""
    return {"compute_moments": lambda self, batch: change(LoopSource.compute_moments(self, batch))}


def changed(gradients: Any, change: Callable[[Tensor], Any]) -> dict[str, Any]:
    return dict(gradients) | {"weight": change(gradients["weight"])}


ROWS: dict[str, tuple[Callable[[Tensor, dict[str, Tensor]], Any], str]] = {
    "nothing": (lambda losses, g: None, r"None from compute_per_sample, but expected the losses and the"),
    "gradients alone": (lambda losses, g: g, r"type dict from compute_per_sample"),
    "three values": (lambda losses, g: (losses, g, g), r"3 values from compute_per_sample"),
    "no losses": (lambda losses, g: (None, g), r"None as losses, but expected 5 real numbers, of shape \(5,\)"),
    "the mean loss": (lambda losses, g: (losses.mean(), g), r"shape \(\) as losses, but expected 5"),
    "too few losses": (lambda losses, g: (losses[1:], g), r"shape \(4,\) as losses, but expected 5"),
    "a column of losses": (lambda losses, g: (losses[:, None], g), r"shape \(5, 1\) as losses"),
    "whole losses": (lambda losses, g: (losses.long(), g), r"torch.int64 and shape \(5,\) as losses"),
    "attached losses": (lambda losses, g: (losses.requires_grad_(), g), "losses with their graph"),
    "a list": (lambda losses, g: (losses, list(g.values())), "type list as per-sample gradient, but expected a dict"),
    "no gradients": (lambda losses, g: (losses, None), "None as per-sample gradient, but expected a dict"),
    "a missing key": (lambda losses, g: (losses, {"weight": g["weight"]}), "other parameters than the model's: bias,"),
    "a further key": (lambda losses, g: (losses, g | {"more": g["bias"]}), r"model's: more \(unknown\)"),
    "prefixed keys": (
        lambda losses, g: (losses, {f"_module.{name}": value for name, value in g.items()}),
        r"weight, bias, _module.weight \(unknown\), _module.bias \(unknown\)",
    ),
    "another order": (lambda losses, g: (losses, dict(reversed(g.items()))), r"another order than .*named_parameters"),
    "a missing tensor": (lambda losses, g: (losses, changed(g, lambda w: None)), "None for parameter 'weight'"),
    "an array": (
        lambda losses, g: (losses, changed(g, lambda w: w.numpy(force=True))),
        "ndarray for parameter 'weight'",
    ),
    "a row missing": (
        lambda losses, g: (losses, changed(g, lambda w: w[1:])),
        r"shape \(4, 2, 3\) for parameter 'weight', but expected 5 samples of shape \(2, 3\) as per-sample gradient",
    ),
    "flat rows": (lambda losses, g: (losses, changed(g, lambda w: w.flatten(1))), r"shape \(5, 6\) for .* 'weight'"),
    "transposed": (lambda losses, g: (losses, changed(g, lambda w: w.mT)), r"shape \(5, 3, 2\) for .* 'weight'"),
    "float64": (
        lambda losses, g: (losses, changed(g, Tensor.double)),
        r"float64 on .* 'weight', but expected torch.float32 on .* as",
    ),
    "float16": (lambda losses, g: (losses, changed(g, Tensor.half)), r"float16 on .* 'weight'"),
    "meta": (lambda losses, g: (losses, changed(g, lambda w: w.to("meta"))), r"float32 on meta .* 'weight'"),
    "sparse": (lambda losses, g: (losses, changed(g, Tensor.to_sparse)), r"sparse_coo\) for parameter 'weight'"),
    "attached": (
        lambda losses, g: (losses, changed(g, lambda w: w.clone().requires_grad_())),
        "gradient of 'weight' with its graph",
    ),
}

MOMENTS: dict[str, tuple[Callable[[Moments], Any], str]] = {
    "nothing": (lambda m: None, "None from compute_moments, but expected persample.Moments"),
    "a tuple": (lambda m: (m.losses, m.mean, m.second_moment), "type tuple from compute_moments"),
    "the mean loss": (lambda m: dataclasses.replace(m, losses=m.losses.mean()), r"shape \(\) as losses"),
    "attached losses": (lambda m: dataclasses.replace(m, losses=m.losses.requires_grad_()), "losses with their graph"),
    "no second moment": (
        lambda m: dataclasses.replace(m, second_moment=None),
        "None as second moment, but expected a dict",
    ),
    "an empty second moment": (lambda m: dataclasses.replace(m, second_moment={}), "model's: weight, bias"),
    "rows": (
        lambda m: dataclasses.replace(m, mean=changed(m.mean, lambda w: w.expand(5, 2, 3))),
        r"shape \(5, 2, 3\) for parameter 'weight', but expected shape \(2, 3\) as mean gradient",
    ),
    "float64": (
        lambda m: dataclasses.replace(m, second_moment=changed(m.second_moment, Tensor.double)),
        r"float64 .* 'weight', but expected torch.float32 .* as second moment",
    ),
    "attached": (
        lambda m: dataclasses.replace(m, mean=changed(m.mean, lambda w: w.clone().requires_grad_())),
        "mean gradient of 'weight' with its graph",
    ),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def source(check: Any = "first") -> persample.PerSampleGradSource:
    return persample.make_source("own", model(), loss_fn, check=check)


@pytest.mark.parametrize("check", ["never", "first"])
@pytest.mark.parametrize("method", ["moments", "per_sample"])
@pytest.mark.parametrize("name", ROWS)
def test_of_per_sample_gradients(name: str, method: str, check: Any) -> None:
    change, message = ROWS[name]
    use_backend(**rows(change))
    with pytest.raises(ContractError, match=f"Backend Own returned .*{message}.*'loop'"):
        getattr(source(check), method)(INPUTS, TARGETS)


@pytest.mark.parametrize("check", ["never", "first"])
@pytest.mark.parametrize("name", MOMENTS)
def test_of_moments(name: str, check: Any) -> None:
    change, message = MOMENTS[name]
    use_backend(**moments(change))
    with pytest.raises(ContractError, match=f"Backend Own returned .*{message}.*'loop'"):
        source(check).moments(INPUTS, TARGETS)


@pytest.mark.parametrize("name", MOMENTS)
def test_while_recording(name: str) -> None:
    change, message = MOMENTS[name]
    use_backend(**moments(change))
    own = source()
    with pytest.raises(ContractError, match=message), own.recording():
        nn.functional.cross_entropy(own.model(INPUTS), TARGETS).backward()


@pytest.mark.parametrize("name", ["nothing", "float64", "attached"])
def test_by_an_optimizer(name: str) -> None:
    use_backend(**moments(MOMENTS[name][0]))
    optimizer = persample.VOGN(model(), loss_fn, data_size=5, backend="own", hess_init=1.0)
    with pytest.raises(ContractError, match=MOMENTS[name][1]):
        optimizer.observe(INPUTS, TARGETS)


@pytest.mark.parametrize("name", MOMENTS)
def test_crosscheck_and_benchmark_go_on_with_the_others(name: str) -> None:
    use_backend(**moments(MOMENTS[name][0]))
    wrong, right = persample.crosscheck(model(), loss_fn, INPUTS, TARGETS, backends=["own", "hooks"])
    assert right.agrees
    assert not wrong.agrees
    assert wrong.mean == float("inf")
    assert "Backend Own returned" in str(wrong.problem)
    _, wrong_cost, right_cost = persample.benchmark(
        model(), loss_fn, INPUTS, TARGETS, backends=["own", "hooks"], rounds=1
    )
    assert wrong_cost.problem == wrong.problem
    assert right_cost.problem is None


@pytest.mark.parametrize("name", MOMENTS)
def test_explain(name: str) -> None:
    use_backend(**moments(MOMENTS[name][0]), find_uses=persample.PerSampleGradSource.find_uses)
    with pytest.raises(ContractError, match="Backend Own returned"):
        persample.explain(model(), INPUTS, TARGETS, loss_fn, backend="own")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "None from find_uses, but expected an iterable of Use"),
        (["weight"], "type str among what find_uses found"),
    ],
)
def test_uses(found: Any, message: str) -> None:
    use_backend(find_uses=lambda self, batch: found)
    for arguments in ((), (INPUTS, TARGETS, loss_fn)):
        with pytest.raises(ContractError, match=message):
            persample.explain(model(), *arguments, backend="own")
    use_backend(find_uses=lambda self, batch: iter([Use("weight", "rule", "own", ""), Use("bias", "rule", "own", "")]))
    assert persample.explain(model(), INPUTS, TARGETS, loss_fn, backend="own").supported


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g * float("nan"), "NaN in 6 of 6 entries, where the ordinary one has numbers"),
        (lambda g: torch.where(g == g.max(), float("nan"), g), "NaN in 1 of 6 entries"),
    ],
)
def test_nan_where_none_is_due(change: Callable[[Tensor], Tensor], message: str) -> None:
    use_backend(**moments(lambda m: dataclasses.replace(m, mean=changed(m.mean, change))))
    with pytest.raises(DisagreementError, match=f"mean gradient of 'weight' is {message}"):
        source().moments(INPUTS, TARGETS)
    (agreement,) = persample.crosscheck(model(), loss_fn, INPUTS, TARGETS, backends=["own"])
    assert not agreement.agrees
    assert "mean gradient of 'weight' is NaN" in str(agreement.problem)


def test_a_negative_second_moment_is_wrong_and_not_nan() -> None:
    use_backend(**moments(lambda m: dataclasses.replace(m, second_moment=changed(m.second_moment, lambda s: -s))))
    with pytest.raises(DisagreementError, match=r"second moment of 'weight' differs from the ordinary one by \d"):
        source().moments(INPUTS, TARGETS)
    (agreement,) = persample.crosscheck(model(), loss_fn, INPUTS, TARGETS, backends=["own"])
    assert agreement.second_moment == pytest.approx(2)


def test_nan_where_the_gradient_is_nan_agrees() -> None:
    """The derivative of a square root at zero times zero, for all backends alike."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs * 0).sqrt().sum(1) + outputs.square().sum(1)

    for agreement in persample.crosscheck(model(), loss, INPUTS, TARGETS, backends=["hooks", "fused", "vmap"]):
        assert agreement.agrees, agreement


def test_an_error_of_a_backend_leaves_the_others_in_crosscheck() -> None:
    def fail(self: Any, batch: Any) -> Any:
        raise KeyError("a fault of the backend")

    use_backend(compute_moments=fail)
    wrong, right = persample.crosscheck(model(), loss_fn, INPUTS, TARGETS, backends=["own", "hooks"])
    assert "Backend Own failed (KeyError: 'a fault of the backend')" in (wrong.problem or "")
    assert (wrong.agrees, right.agrees) == (False, True)
