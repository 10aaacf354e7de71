"""The self-check: backends of third parties that are wrong are caught, by the name of what is wrong."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import persample
from persample import losses
from persample.errors import DisagreementError
from persample.sources import registry
from persample.sources.selfcheck.tolerances import tolerance
from persample.testing.devices import generator_of

#: Backends as a third party would write them, each wrong in its own way.
WRONG_BACKENDS = '''
import dataclasses
import torch
from persample.sources.backends.loop import LoopSource


class Changed(LoopSource):
    """Right, but for what `change` does to the second layer's weight."""

    def compute_per_sample(self, batch):
        losses, gradients = super().compute_per_sample(batch)
        return losses, gradients | {"2.weight": self.change(gradients["2.weight"])}

    def compute_moments(self, batch):
        _, gradients = self.compute_per_sample(batch)
        moments = super().compute_moments(batch)
        rows = gradients["2.weight"]
        return dataclasses.replace(
            moments,
            mean={**moments.mean, "2.weight": rows.mean(0)},
            second_moment={**moments.second_moment, "2.weight": rows.square().mean(0)},
        )


class WrongScale(Changed):
    def change(self, rows):
        return rows / len(rows)


class WrongSign(Changed):
    def change(self, rows):
        return -rows


class PermutedRows(Changed):
    def change(self, rows):
        return rows.roll(1, 0)


class AveragedRows(Changed):
    def change(self, rows):
        return rows.mean(0).expand_as(rows)


class NotANumber(Changed):
    def change(self, rows):
        return rows * float("nan")


class SlightlyOff(Changed):
    def change(self, rows):
        return rows * (1 + 1e-5)


class TooManyRows(Changed):
    def change(self, rows):
        return torch.cat([rows, torch.zeros_like(rows)])


class MissingParameter(LoopSource):
    def compute_per_sample(self, batch):
        losses, gradients = super().compute_per_sample(batch)
        del gradients["2.weight"]
        return losses, gradients

    def compute_moments(self, batch):
        moments = super().compute_moments(batch)
        return dataclasses.replace(moments, mean={n: g for n, g in moments.mean.items() if n != "2.weight"})


class WrongLosses(LoopSource):
    def compute_per_sample(self, batch):
        losses, gradients = super().compute_per_sample(batch)
        return losses / batch.size, gradients

    def compute_moments(self, batch):
        moments = super().compute_moments(batch)
        return dataclasses.replace(moments, losses=moments.losses / batch.size)


class SquaredMean(LoopSource):
    """The square of the mean, where the mean of the squares is due."""

    def compute_moments(self, batch):
        moments = super().compute_moments(batch)
        changed = {**moments.second_moment, "2.weight": moments.mean["2.weight"].square()}
        return dataclasses.replace(moments, second_moment=changed)


class DividedTwice(LoopSource):
    def compute_moments(self, batch):
        moments = super().compute_moments(batch)
        changed = {**moments.second_moment, "2.weight": moments.second_moment["2.weight"] / batch.size}
        return dataclasses.replace(moments, second_moment=changed)


class WrongLater(LoopSource):
    """Right in its first three calls: one from outside and those of the self-check."""

    calls = 0

    def compute_per_sample(self, batch):
        self.calls += 1
        losses, gradients = super().compute_per_sample(batch)
        return losses, gradients if self.calls == 1 else {n: 2 * g for n, g in gradients.items()}
'''


@pytest.fixture
def wrong_backends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module above can be imported, and its backends are registered, until the test ends."""
    (tmp_path / "wrong_backends.py").write_text(textwrap.dedent(WRONG_BACKENDS))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    for line in WRONG_BACKENDS.splitlines():
        if line.startswith("class "):
            name = line.removeprefix("class ").partition("(")[0]
            persample.register_backend(name, f"wrong_backends:{name}")


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 3, generator=generator_of(1)).double(), torch.arange(5) % 2


pytestmark = pytest.mark.usefixtures("wrong_backends")


@pytest.mark.parametrize(
    ("backend", "method", "message"),
    [
        ("WrongScale", "moments", "mean gradient of '2.weight'"),
        ("WrongScale", "per_sample", "sum of the per-sample gradients of '2.weight'"),
        ("WrongSign", "moments", "mean gradient of '2.weight'"),
        ("WrongSign", "per_sample", "sum of the per-sample gradients of '2.weight'"),
        ("PermutedRows", "per_sample", "weighted sum of the per-sample gradients of '2.weight'"),
        ("AveragedRows", "moments", "second moment of '2.weight'"),
        ("AveragedRows", "per_sample", "per-sample gradients of '2.weight'"),
        ("NotANumber", "moments", "mean gradient of '2.weight'"),
        ("NotANumber", "per_sample", "sum of the per-sample gradients of '2.weight'"),
        ("SlightlyOff", "moments", "mean gradient of '2.weight'"),
        ("SlightlyOff", "per_sample", "sum of the per-sample gradients of '2.weight'"),
        ("TooManyRows", "per_sample", r"shape \(10, 2, 4\) for parameter '2.weight', but expected 5 samples"),
        ("MissingParameter", "moments", "other parameters than the model's: 2.weight"),
        ("MissingParameter", "per_sample", "other parameters than the model's: 2.weight"),
        ("WrongLosses", "moments", "the losses"),
        ("WrongLosses", "per_sample", "the losses"),
        ("SquaredMean", "moments", "second moment of '2.weight'"),
        ("DividedTwice", "moments", "second moment of '2.weight'"),
    ],
)
def test_wrong_backends_are_caught(
    backend: str, method: str, message: str, model: nn.Module, batch: Any, no_trace: Any
) -> None:
    source = persample.make_source(backend, model, losses.cross_entropy)
    with pytest.raises(DisagreementError, match=message) as raised, no_trace(model, batch):
        getattr(source, method)(*batch)
    assert backend in str(raised.value)
    assert "'loop'" in str(raised.value)


@pytest.mark.parametrize("backend", ["WrongScale", "PermutedRows", "SquaredMean"])
def test_every_batch_of_the_first_kind_is_checked_until_one_is_right(
    backend: str, model: nn.Module, batch: Any
) -> None:
    source = persample.make_source(backend, model, losses.cross_entropy)
    method = "per_sample" if backend == "PermutedRows" else "moments"
    for _ in range(2):
        with pytest.raises(DisagreementError):
            getattr(source, method)(*batch)


def test_never_means_never(model: nn.Module, batch: Any) -> None:
    right = persample.make_source("loop", model, losses.cross_entropy).per_sample(*batch)
    wrong = persample.make_source("WrongSign", model, losses.cross_entropy, check="never").per_sample(*batch)
    assert torch.equal(wrong["2.weight"], -right["2.weight"])


def test_first_means_the_first_and_always_means_always(model: nn.Module, batch: Any) -> None:
    source = persample.make_source("WrongLater", model, losses.cross_entropy)
    source.per_sample(*batch)
    source.per_sample(*batch)
    source = persample.make_source("WrongLater", model, losses.cross_entropy, check="always")
    source.per_sample(*batch)
    with pytest.raises(DisagreementError):
        source.per_sample(*batch)


CHANGES = ["mode", "frozen", "kind of inputs", "method", "a batch of one came first", "autocast", "parameter"]


@pytest.mark.parametrize("change", CHANGES)
def test_first_is_asked_again_when_something_is_new(change: str, model: nn.Module, batch: Any) -> None:
    source = persample.make_source("WrongLater", model, losses.cross_entropy)
    inputs, targets = batch
    if change == "a batch of one came first":
        source.per_sample(inputs[:1], targets[:1])
    else:
        source.per_sample(inputs, targets)
    if change == "mode":
        model.eval()
    if change == "frozen":
        model[0].weight.requires_grad_(False)
    if change == "kind of inputs":
        inputs, targets = inputs.unsqueeze(1).expand(-1, 2, -1), torch.zeros(5, 2, 2).double()
        source.loss_fn = losses.gaussian
    if change == "parameter":
        model[0].bias = nn.Parameter(model[0].bias.detach().clone())
    if change == "method":
        source.compute_moments = lambda batch: persample.PerSampleGradSource.compute_moments(source, batch)
    with (
        pytest.raises(DisagreementError),
        torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=change == "autocast"),
    ):
        (source.moments if change == "method" else source.per_sample)(inputs, targets)


def test_the_check_draws_no_random_numbers_of_its_own(backend: str) -> None:
    """With and without the check, a model with dropout gives the same numbers and leaves the generator alike."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2)).double()
    inputs, targets = torch.randn(5, 3).double(), torch.arange(5) % 2
    options = {"randomness": "different"} if backend == "vmap" else {}
    results, states = [], []
    for check in ("always", "never"):
        torch.manual_seed(3)
        source = persample.make_source(backend, model, losses.cross_entropy, check=check, **options)
        results.append(source.moments(inputs, targets))
        states.append(torch.get_rng_state())
    assert torch.equal(results[0].losses, results[1].losses)
    torch.testing.assert_close(dict(results[0].second_moment), dict(results[1].second_moment), rtol=1e-12, atol=0)
    assert torch.equal(*states)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_right_results_of_any_size_pass(backend: str, dtype: torch.dtype, scale: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).to(dtype)
    inputs, targets = torch.randn(16, 1, 8, 8, dtype=dtype), torch.arange(16) % 3

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return scale * losses.cross_entropy(outputs, targets)

    source = persample.make_source(backend, model, loss_fn, check="always")
    source.moments(inputs, targets)
    source.per_sample(inputs, targets)


class InFloat32(nn.Module):
    """Normalises in float32, whatever its input is, as many language models do."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


@pytest.mark.parametrize("method", ["moments", "per_sample"])
def test_the_least_precise_number_of_a_model_counts(backend: str, method: str) -> None:
    torch.manual_seed(0)
    middle = nn.Sequential(InFloat32(), nn.Linear(40, 40), nn.SiLU(), InFloat32())
    model = nn.Sequential(nn.Linear(3, 40), middle, nn.Linear(40, 2)).double()
    inputs, targets = torch.randn(16, 3).double(), torch.arange(16) % 2
    getattr(persample.make_source(backend, model, losses.cross_entropy), method)(inputs, targets)


def test_the_least_precise_number_of_a_graph_is_found() -> None:
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    assert tolerance(x) == tolerance(2 * x) == tolerance(x.detach()) == 1e-7
    assert tolerance((2 * x).float()) == tolerance((2 * x).float().double() + x) == 1e-3
    assert tolerance((2 * x).bfloat16().double()) == 5e-2
