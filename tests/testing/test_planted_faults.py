"""The suite is red for a backend that is wrong: many faults, each planted in the loop, the oracle itself."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from torch import Tensor, nn

import persample
from persample.moments import Moments
from persample.sources import registry
from persample.sources.backends.loop import LoopSource
from persample.sources.batch import Batch
from persample.testing import ZOO, BackendSuite

Rows = dict[str, Tensor]


def each(change: Callable[[Tensor], Tensor]) -> Callable[[Rows], Rows]:
    return lambda rows: {name: change(g) for name, g in rows.items()}


def chosen(choose: Callable[[str], bool], change: Callable[[Tensor], Tensor]) -> Callable[[Rows], Rows]:
    return lambda rows: {name: change(g) if choose(name) else g for name, g in rows.items()}


def clipped(rows: Rows) -> Rows:
    norms = sum(g.flatten(1).square().sum(1) for g in rows.values())
    factors = 1 / (1 + norms.sqrt())  # type: ignore[union-attr]
    return {name: torch.einsum("b,b...->b...", factors, g) for name, g in rows.items()}


#: Of the per-sample gradients, and so of the moments too.
ROWS: dict[str, Callable[[Rows], Rows]] = {
    "divided by the batch size": each(lambda g: g / (2 * len(g))),
    "twice as large": each(lambda g: 2 * g),
    "of the other sign": each(torch.neg),
    "without sign": each(torch.abs),
    "off by a millionth": each(lambda g: g * (1 + 1e-6)),
    "off by rounding in float32": each(lambda g: g.float().to(g.dtype) * (1 + 1e-8)),
    "rounded to float16": each(lambda g: g.half().to(g.dtype)),
    "in float32": each(Tensor.float),
    "in float16": each(Tensor.half),
    "shifted": each(lambda g: g + 1e-4),
    "all zero": each(torch.zeros_like),
    "zero for biases": chosen(lambda name: name.endswith("bias"), torch.zeros_like),
    "zero for weights": chosen(lambda name: name.endswith("weight"), torch.zeros_like),
    "the first sample's alone right": each(lambda g: torch.cat([g[:1], 2 * g[1:]])),
    "the last sample's alone wrong": each(lambda g: torch.cat([g[:-1], 2 * g[-1:]])),
    "clipped": clipped,
    "with their graph": each(lambda g: g.clone().requires_grad_()),
    "without a bias": lambda rows: {name: g for name, g in rows.items() if not name.endswith("bias")},
    "with other names": lambda rows: {f"_module.{name}": g for name, g in rows.items()},
    "in another order": lambda rows: dict(reversed(rows.items())),
    "summed up": each(lambda g: g.sum(0)),
    "not a number": each(lambda g: g * float("nan")),
    "infinite": each(lambda g: g / 0.0),
}

#: Of the per-sample gradients, where there are several.
SEVERAL_ROWS: dict[str, Callable[[Rows], Rows]] = {
    "of the next sample": each(lambda g: g.roll(1, 0)),
    "in reversed order": each(lambda g: g.flip(0)),
    "two exchanged": each(lambda g: torch.cat([g[1:2], g[:1], g[2:]]) if len(g) > 1 else g),
    "exchanged for biases": chosen(lambda name: name.endswith("bias"), lambda g: g.roll(1, 0)),
    "averaged": each(lambda g: g.mean(0).expand_as(g).contiguous()),
    "centred": each(lambda g: g - g.mean(0) if len(g) > 1 else g),
    "those of the first sample": each(lambda g: g[:1].expand_as(g).contiguous()),
}


def second(change: Callable[[Moments, str], Tensor]) -> Callable[[Moments], Moments]:
    return lambda m: dataclasses.replace(m, second_moment={name: change(m, name) for name in m.second_moment})


#: Of the moments alone; the batch size is B.
MOMENTS: dict[str, Callable[[Moments], Moments]] = {
    "a sum for the mean": lambda m: dataclasses.replace(m, mean={n: g * m.batch_size for n, g in m.mean.items()}),
    "no mean of a bias": lambda m: dataclasses.replace(
        m, mean={n: g * (not n.endswith("bias")) for n, g in m.mean.items()}
    ),
    "the squared mean": second(lambda m, name: m.mean[name].square()),
    "the variance": second(lambda m, name: m.second_moment[name] - m.mean[name].square()),
    "divided by B - 1": second(lambda m, name: m.second_moment[name] * m.batch_size / max(1, m.batch_size - 1)),
    "divided by B twice": second(lambda m, name: m.second_moment[name] / m.batch_size),
    "not divided by B": second(lambda m, name: m.second_moment[name] * m.batch_size),
    "the root": second(lambda m, name: m.second_moment[name].sqrt()),
    "negative": second(lambda m, name: -m.second_moment[name]),
    "exchanged losses": lambda m: dataclasses.replace(m, losses=m.losses.roll(1)),
    "the mean loss": lambda m: dataclasses.replace(m, losses=m.losses.mean().expand(m.batch_size)),
    "attached losses": lambda m: dataclasses.replace(m, losses=m.losses.clone().requires_grad_()),
}


class Wrong(LoopSource):
    """The loop with changes, which a test sets on a subclass."""

    rows: Callable[[Rows], Rows] = staticmethod(lambda rows: rows)
    moments_changed: Callable[[Moments], Moments] = staticmethod(lambda moments: moments)

    def compute_per_sample(self, batch: Batch) -> tuple[Tensor, Rows]:
        losses, rows = super().compute_per_sample(batch)
        return losses, self.rows(rows)

    def compute_moments(self, batch: Batch) -> Moments:
        return self.moments_changed(persample.PerSampleGradSource.compute_moments(self, batch))


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Callable[..., BackendSuite]:
    """The suite of a class of sources, or of the loop with changes."""

    def make(source: type = Wrong, **attributes: Any) -> BackendSuite:
        changed = type("Planted", (source,), {name: staticmethod(value) for name, value in attributes.items()})
        monkeypatch.setattr(registry, "_load", lambda backend: changed)
        monkeypatch.setattr(registry, "_registered", dict(registry._registered))
        persample.register_backend("planted", "planted:Source")
        return type("TestPlanted", (BackendSuite,), {"backend": "planted"})()

    return make


def assert_red(suite: BackendSuite, *names: str) -> None:
    for name in names:
        with pytest.raises(AssertionError):
            suite.test_zoo(ZOO[name])


def test_the_loop_with_nothing_planted_is_green(suite: Callable[..., BackendSuite]) -> None:
    green = suite()
    for name in ("Linear", "MLP", "LeNet", "Embedding with a padding index", "BatchNorm1d in training mode"):
        green.test_zoo(ZOO[name])
    green.test_one_source_for_many_batches("moments")
    green.test_one_source_for_many_batches("per_sample")


@pytest.mark.parametrize("fault", ROWS)
def test_wrong_rows(fault: str, suite: Callable[..., BackendSuite]) -> None:
    assert_red(suite(rows=ROWS[fault]), "Linear", "MLP")


@pytest.mark.parametrize("fault", SEVERAL_ROWS)
def test_rows_of_other_samples(fault: str, suite: Callable[..., BackendSuite]) -> None:
    assert_red(suite(rows=SEVERAL_ROWS[fault]), "Linear", "MLP")


@pytest.mark.parametrize("fault", MOMENTS)
def test_wrong_moments(fault: str, suite: Callable[..., BackendSuite]) -> None:
    assert_red(suite(moments_changed=MOMENTS[fault]), "Linear", "MLP")


@pytest.mark.parametrize("size", [1, 3, 4])
def test_wrong_for_one_batch_size(size: int, suite: Callable[..., BackendSuite]) -> None:
    """One sample, several, or as many as the inputs have features."""
    assert_red(suite(rows=each(lambda g: 2 * g if len(g) == size else g)), "Linear", "MLP")


class OfAnotherModel(LoopSource):
    """Computes with a copy of the model that lacks an option of some layers."""

    def compute_per_sample(self, batch: Batch) -> tuple[Tensor, Rows]:
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model)
        for module in other.model.modules():
            if getattr(module, "padding_mode", "zeros") != "zeros":
                module.padding_mode = "zeros"
            if isinstance(module, nn.Embedding):
                module.padding_idx = None
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-5 if module.eps != 1e-5 else 1e-6
        return LoopSource.compute_per_sample(other, batch)

    def compute_moments(self, batch: Batch) -> Moments:
        return persample.PerSampleGradSource.compute_moments(self, batch)


@pytest.mark.parametrize("name", ["Embedding with a padding index", "Conv2d with circular padding", "LayerNorm"])
def test_overlooked_options(name: str, suite: Callable[..., BackendSuite]) -> None:
    green = suite(OfAnotherModel)
    green.test_zoo(ZOO["MLP"])
    assert_red(green, name)


class Remembering(Wrong):
    """Returns what it computed for the first batch of this size, whatever comes later."""

    def compute_per_sample(self, batch: Batch) -> tuple[Tensor, Rows]:
        known = vars(self).setdefault("known", {})
        if batch.size not in known:
            known[batch.size] = super().compute_per_sample(batch)
        return known[batch.size]


class Frozen(Wrong):
    """Goes by the weights that the model had when the source was made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.copied = copy.deepcopy(self.model)

    def compute_per_sample(self, batch: Batch) -> tuple[Tensor, Rows]:
        other = copy.copy(self)
        other.model = self.copied
        return LoopSource.compute_per_sample(other, batch)


@pytest.mark.parametrize("source", [Remembering, Frozen])
@pytest.mark.parametrize("method", ["moments", "per_sample"])
def test_what_was_right_once(source: type, method: Any, suite: Callable[..., BackendSuite]) -> None:
    with pytest.raises(AssertionError):
        suite(source).test_one_source_for_many_batches(method)


class Writing(LoopSource):
    """Changes the inputs."""

    def compute_per_sample(self, batch: Batch) -> tuple[Tensor, Rows]:
        found = super().compute_per_sample(batch)
        batch.args[0].add_(1)
        return found


def test_changed_inputs(suite: Callable[..., BackendSuite]) -> None:
    assert_red(suite(Writing), "Linear", "MLP")


@pytest.fixture
def no_shrinking() -> Iterator[None]:
    """Let hypothesis stop at the first failure: to simplify it would take long."""
    before = settings.default
    settings.register_profile("first failure", before, phases=[Phase.generate], database=None)
    settings.load_profile("first failure")
    yield
    settings.register_profile("before", before)
    settings.load_profile("before")


@pytest.mark.usefixtures("no_shrinking")
def test_drawn_models_find_what_the_self_check_finds(suite: Callable[..., BackendSuite]) -> None:
    for test in ("test_drawn_layers", "test_drawn_anything"):
        with pytest.raises(AssertionError, match="wrong number"):
            getattr(suite(rows=ROWS["twice as large"]), test)()
