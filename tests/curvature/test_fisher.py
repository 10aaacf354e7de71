"""The diagonal of the Fisher information against loops over single samples in float64, and against closed forms."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import persample
from persample import Fisher, backends, fisher, losses
from persample.checks.memory import peak_memory
from persample.errors import BatchError, DataError, LossError, OptionError, PersampleError, UsageError
from persample.likelihoods import Categorical
from persample.testing.devices import generator_of

Squares = dict[str, Tensor]


def network(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def data(outputs: int = 3) -> tuple[Tensor, Tensor]:
    g = generator_of(1)
    return torch.randn(11, 4, generator=g, dtype=torch.float64), torch.randint(outputs, (11,), generator=g)


def loader(x: Tensor, y: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, y), batch_size=4)


def squares_by_loop(model: nn.Module, loss: Callable[[Tensor, Any], Tensor], x: Tensor, y: Any) -> Squares:
    """Σ g_i² by one backward pass for each sample."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(len(x)):
        gradients = torch.autograd.grad(loss(model(x[i : i + 1]), y[i : i + 1]).sum(), list(model.parameters()))
        for square, gradient in zip(total.values(), gradients, strict=True):
            square += gradient.square()
    return total


def assert_is(found: Fisher, due: Squares, size: int) -> None:
    assert found.data_size == size
    assert list(found.diagonal) == list(due)
    for name, square in due.items():
        torch.testing.assert_close(found.diagonal[name], square / size, rtol=1e-9, atol=1e-12)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


@pytest.mark.parametrize("backend", ["fused", "loop", "vmap", "hooks", "backpack", "opacus"])
class TestOfAnyBackend:
    @pytest.fixture(autouse=True)
    def installed(self, backend: str) -> None:
        if problem := backends()[backend].problem:
            pytest.skip(problem)

    def test_empirical(self, backend: str) -> None:
        model, (x, y) = network(), data()
        found = fisher(model, loader(x, y), loss_fn=losses.cross_entropy, backend=backend)
        assert_is(found, squares_by_loop(model, cross_entropy, x, y), 11)

    def test_exact_for_classes(self, backend: str) -> None:
        """Σ_c p_c g_c², by a loop over samples and classes."""
        model, (x, y) = network(), data()
        due = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for i in range(len(x)):
            p = model(x[i : i + 1]).softmax(1).detach()[0]
            for c in range(3):
                one = squares_by_loop(model, cross_entropy, x[i : i + 1], torch.tensor([c]))
                for name, square in one.items():
                    due[name] += p[c] * square
        found = fisher(model, loader(x, y), loss_fn=losses.cross_entropy, kind="exact", backend=backend)
        assert_is(found, due, 11)


@pytest.mark.parametrize(
    ("loss_fn", "variance"),
    [
        (losses.bernoulli, lambda f: f.sigmoid() * (1 - f.sigmoid())),
        (nn.BCEWithLogitsLoss(), lambda f: f.sigmoid() * (1 - f.sigmoid())),
        (losses.gaussian, torch.ones_like),
        (functools.partial(losses.gaussian, noise_precision=4.0), lambda f: torch.full_like(f, 4.0)),
    ],
)
def test_exact_for_independent_outputs(loss_fn: Any, variance: Callable[[Tensor], Tensor]) -> None:
    """Σ_d v_d (∂f_d/∂w)²."""
    model, (x, _) = network(2), data()
    due = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(len(x)):
        outputs = model(x[i])
        for f, v in zip(outputs, variance(outputs.detach()), strict=True):
            gradients = torch.autograd.grad(f, list(model.parameters()), retain_graph=True)
            for square, gradient in zip(due.values(), gradients, strict=True):
                square += v * gradient.square()
    assert_is(fisher(model, loader(x, torch.zeros(11, 2)), loss_fn=loss_fn, kind="exact"), due, 11)


@pytest.mark.parametrize(
    ("loss_fn", "outputs"),
    [
        (losses.cross_entropy, 3),
        (nn.CrossEntropyLoss(), 3),
        (losses.bernoulli, 2),
        (functools.partial(losses.gaussian, noise_precision=4.0), 2),
    ],
)
def test_drawn_targets_lead_to_the_exact_one(loss_fn: Any, outputs: int) -> None:
    """Within the error of 1,000 draws; the targets of the data do not matter."""
    model, (x, y) = network(outputs), data()
    exact = fisher(model, loader(x, y), loss_fn=loss_fn, kind="exact")
    drawn = fisher(
        model, DataLoader(TensorDataset(x, y), 11), loss_fn=loss_fn, kind="mc", draws=1000, generator=generator_of(0)
    )
    for name, due in exact.diagonal.items():
        torch.testing.assert_close(drawn.diagonal[name], due, rtol=0.3, atol=0.04 * due.max().item())


def test_draws_repeat_with_their_generator_and_positions_are_drawn() -> None:
    torch.manual_seed(0)
    model = nn.Conv1d(2, 3, 1).double()
    x, y = torch.randn(6, 2, 5, dtype=torch.float64), torch.zeros(6, 5).long()
    one, same, other = (
        fisher(model, loader(x, y), loss_fn=losses.cross_entropy, kind="mc", generator=generator_of(seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(one.diagonal["weight"], same.diagonal["weight"])
    assert not torch.equal(one.diagonal["weight"], other.diagonal["weight"])


class Tokens(nn.Module):
    """Logits of each position that depend on all positions, with the classes last or in dim 1."""

    def __init__(self, *, classes_last: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.head = nn.Linear(3, 4), nn.Linear(4, 3)
        self.classes_last = classes_last
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.mix(x).cumsum(1).tanh())
        return logits if self.classes_last else logits.movedim(-1, 1)


TOKENS = torch.randn(5, 4, 3, dtype=torch.float64, generator=generator_of(2))
LABELS = torch.randint(3, (5, 4), generator=generator_of(3))


@pytest.mark.parametrize("classes_last", [False, True])
class TestPositions:
    def loss_fn(self, classes_last: bool) -> Any:
        return Categorical(classes_last=True) if classes_last else losses.cross_entropy

    def due(self, counted: Tensor) -> Squares:
        """Σ over samples and positions of Σ_c p_c (∂ log p_c / ∂w)², by a loop."""
        model = Tokens(classes_last=True)
        total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for x, counts in zip(TOKENS, counted, strict=True):
            logs = model(x[None])[0].log_softmax(1)
            for of_position in logs[counts]:
                for log_p in of_position:
                    gradients = torch.autograd.grad(log_p, list(model.parameters()), retain_graph=True)
                    for square, gradient in zip(total.values(), gradients, strict=True):
                        square += log_p.detach().exp() * gradient.square()
        return total

    @pytest.mark.parametrize("backend", ["fused", "vmap"])
    def test_exact(self, classes_last: bool, backend: str) -> None:
        model = Tokens(classes_last=classes_last)
        found = fisher(model, loader(TOKENS, LABELS), loss_fn=self.loss_fn(classes_last), kind="exact", backend=backend)
        assert_is(found, self.due(torch.ones(5, 4).bool()), 5)

    def test_targets_that_are_left_out_carry_no_information(self, classes_last: bool) -> None:
        """As in padded sequences; one sample has none that counts."""
        counted = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0]]).bool()
        labels = LABELS.masked_fill(~counted, -100)
        model, loss_fn = Tokens(classes_last=classes_last), self.loss_fn(classes_last)
        exact = fisher(model, loader(TOKENS, labels), loss_fn=loss_fn, kind="exact")
        assert_is(exact, self.due(counted), 5)
        repeated = TensorDataset(TOKENS.repeat(400, 1, 1), labels.repeat(400, 1))
        drawn = fisher(model, DataLoader(repeated, 2000), loss_fn=loss_fn, kind="mc", generator=generator_of(0))
        for name, due in exact.diagonal.items():
            torch.testing.assert_close(drawn.diagonal[name], due, rtol=0.3, atol=0.06 * due.max().item())

    def test_exact_is_what_drawn_targets_lead_to(self, classes_last: bool) -> None:
        model, loss_fn = Tokens(classes_last=classes_last), self.loss_fn(classes_last)
        exact = fisher(model, loader(TOKENS, LABELS), loss_fn=loss_fn, kind="exact")
        repeated = TensorDataset(TOKENS.repeat(400, 1, 1), LABELS.repeat(400, 1))
        drawn = fisher(model, DataLoader(repeated, 2000), loss_fn=loss_fn, kind="mc", generator=generator_of(0))
        for name, due in exact.diagonal.items():
            torch.testing.assert_close(drawn.diagonal[name], due, rtol=0.3, atol=0.06 * due.max().item())

    @pytest.mark.parametrize("kind", ["mc", "exact", "empirical"])
    def test_classes_in_another_dimension_are_refused(self, classes_last: bool, kind: Any) -> None:
        model = Tokens(classes_last=not classes_last)
        loss_fn = Categorical(classes_last=classes_last)
        with pytest.raises(LossError, match=r"have their classes in dim.*one class index for each position"):
            fisher(model, loader(TOKENS, LABELS), loss_fn=loss_fn, kind=kind)


def test_an_ignored_class_carries_no_information() -> None:
    model, (x, y) = network(), data()
    ignoring = nn.CrossEntropyLoss(ignore_index=1)
    exact = fisher(model, loader(x, y), loss_fn=ignoring, kind="exact")
    others = fisher(model, loader(x[y != 1], y[y != 1]), loss_fn=losses.cross_entropy, kind="exact")
    assert exact.data_size == 11
    for name, value in others.diagonal.items():
        torch.testing.assert_close(11 * exact.diagonal[name], others.data_size * value)


@pytest.mark.parametrize("kind", ["empirical", "mc", "exact"])
def test_the_model_is_left_as_it_was(kind: Any) -> None:
    model, (x, y) = network(), data()
    model[0].weight.grad = torch.ones(5, 4, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    fisher(model, loader(x, y), loss_fn=losses.cross_entropy, kind=kind)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones(5, 4, dtype=torch.float64))
    assert model[2].weight.grad is None


class WithLogits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=self.inner(x))


@pytest.mark.parametrize("kind", ["mc", "exact"])
def test_dicts_and_outputs_with_logits(kind: Any) -> None:
    model, (x, y) = WithLogits(), data()
    batches = [{"x": x[:6], "labels": y[:6]}, {"x": x[6:], "labels": y[6:]}]
    found = fisher(model, batches, loss_fn=losses.cross_entropy, kind=kind, generator=generator_of(0))
    plain = fisher(
        model.inner,
        [(x[:6], y[:6]), (x[6:], y[6:])],
        loss_fn=losses.cross_entropy,
        kind=kind,
        generator=generator_of(0),
    )
    for name, value in plain.diagonal.items():
        torch.testing.assert_close(found.diagonal[f"inner.{name}"], value)


class TestInParts:
    def test_merged_is_the_whole(self) -> None:
        model, (x, y) = network(), data()
        whole, *parts = (
            fisher(model, loader(x[rows], y[rows]), loss_fn=losses.cross_entropy)
            for rows in (slice(0, 11), slice(0, 3), slice(3, 11))
        )
        assert_is(parts[0].merge(parts[1]), {n: 11 * t for n, t in whole.diagonal.items()}, 11)

    def test_others_do_not_merge(self) -> None:
        one = Fisher({"a": torch.ones(2)}, 3)
        with pytest.raises(OptionError, match="'empirical' cannot merge with one of kind 'mc'"):
            one.merge(Fisher({"a": torch.ones(2)}, 3, "mc"))
        for other in ({"a": torch.ones(3)}, {"b": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(2)}):
            with pytest.raises(OptionError, match=r"different models: they differ in '[ab]'"):
                one.merge(Fisher(other, 3))


class TestFiles:
    def test_saved_and_loaded(self, tmp_path: Path) -> None:
        pytest.importorskip("safetensors")
        model, (x, y) = network(), data()
        found = fisher(model, loader(x, y), loss_fn=losses.cross_entropy, kind="exact")
        found.save(tmp_path / "f.safetensors")
        loaded = Fisher.load(tmp_path / "f.safetensors")
        assert (loaded.data_size, loaded.kind, list(loaded.diagonal)) == (11, "exact", list(found.diagonal))
        assert all(torch.equal(t, found.diagonal[name]) for name, t in loaded.diagonal.items())

    def test_what_is_none_is_refused(self, tmp_path: Path) -> None:
        safetensors = pytest.importorskip("safetensors.torch")
        path = tmp_path / "f"
        with pytest.raises(DataError, match="cannot be read"):
            Fisher.load(path)
        path.write_bytes(b"junk")
        with pytest.raises(DataError, match="cannot be read"):
            Fisher.load(path)
        safetensors.save_file({"a": torch.ones(2)}, path)
        with pytest.raises(DataError, match="not a Fisher information"):
            Fisher.load(path)
        header = {"format": "persample fisher", "version": "1", "kind": "mc", "data_size": "3", "parameters": '["a"]'}
        safetensors.save_file({"a": torch.ones(2)}, path, header)
        assert Fisher.load(path).kind == "mc"
        damages: list[tuple[dict[str, Tensor], dict[str, str]]] = [
            ({"a": -torch.ones(2)}, {}),
            ({"a": torch.ones(2), "b": torch.ones(2)}, {}),
            ({"b": torch.ones(2)}, {}),
            ({"a": torch.ones(2)}, {"data_size": "-3"}),
            ({"a": torch.ones(2)}, {"kind": "some"}),
            ({"a": torch.ones(2)}, {"parameters": "5"}),
        ]
        for tensors, changes in damages:
            safetensors.save_file(tensors, path, header | changes)
            with pytest.raises(DataError, match="is damaged"):
                Fisher.load(path)


class TestRefusals:
    def run(self, batches: Any = None, **options: Any) -> Fisher:
        x, y = data()
        defaults = {"loss_fn": losses.cross_entropy}
        return fisher(network(), [(x, y)] if batches is None else batches, **(defaults | options))

    def test_arguments(self) -> None:
        for options in ({"kind": "diag"}, {"draws": 0, "kind": "mc"}, {"generator": 3}):
            with pytest.raises(OptionError, match=str(next(iter(options)))):
                self.run(**options)

    def test_a_data_set_in_place_of_a_loader(self) -> None:
        with pytest.raises(BatchError, match=r"TensorDataset, whose entries are single samples: pass DataLoader\("):
            self.run(TensorDataset(*data()))
        x, y = data()
        found = self.run(DataLoader(TensorDataset(x[None], y[None]), batch_size=None))
        assert found.data_size == 11

    def test_nothing_to_derive_by(self) -> None:
        with pytest.raises(UsageError, match="no parameter that requires a gradient"):
            fisher(network().requires_grad_(False), [data()], loss_fn=losses.cross_entropy)

    @pytest.mark.parametrize("kind", ["empirical", "mc", "exact"])
    def test_a_class_in_place_of_a_loss(self, kind: Any) -> None:
        with pytest.raises(LossError, match=r"is the class Categorical itself: pass one of its instances"):
            self.run(loss_fn=Categorical, kind=kind)

    def test_a_squared_error_has_no_noise(self) -> None:
        for loss_fn in (nn.MSELoss(), functools.partial(F.mse_loss, reduction="none")):
            with pytest.raises(UsageError, match=r"use persample\.likelihoods\.Gaussian"):
                self.run(loss_fn=loss_fn, kind="exact")

    def test_merging_with_something_else(self) -> None:
        with pytest.raises(OptionError, match="not with dict"):
            self.run().merge({})  # type: ignore[arg-type]

    def test_an_entry_that_the_model_does_not_take(self) -> None:
        x, y = data()
        with pytest.raises(BatchError, match=r"nor with its entries \(got an unexpected keyword argument 'index'\)"):
            self.run([{"input": x, "index": torch.arange(11), "labels": y}])

    def test_an_empty_loader(self) -> None:
        with pytest.raises(UsageError, match="no batch"):
            self.run([])

    @pytest.mark.parametrize("batch", [(data()[0],), data()[0], {"x": data()[0]}, (1, 2, 3)])
    def test_batches_without_targets(self, batch: Any) -> None:
        with pytest.raises(BatchError, match="let the loader yield pairs"):
            self.run([batch])

    @pytest.mark.parametrize(
        "loss_fn",
        [
            F.mse_loss,
            nn.CrossEntropyLoss(weight=torch.ones(3).double()),
            nn.CrossEntropyLoss(label_smoothing=0.1),
            functools.partial(F.cross_entropy, label_smoothing=0.1, reduction="none"),
            lambda outputs, targets: outputs.sum(1),
        ],
    )
    @pytest.mark.parametrize("kind", ["mc", "exact"])
    def test_losses_that_are_no_known_distribution(self, loss_fn: Any, kind: str) -> None:
        with pytest.raises(UsageError, match=r'need a loss that is a distribution.*kind="empirical"'):
            self.run(loss_fn=loss_fn, kind=kind)

    def test_a_model_that_mixes_samples(self) -> None:
        x, y = data()
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
        with pytest.raises(PersampleError):
            fisher(model, [(x, y)], loss_fn=losses.cross_entropy)


def test_progress_shows_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    x, y = data()
    fisher(network(), loader(x, y), loss_fn=losses.cross_entropy, progress=True)
    assert "3/3" in capsys.readouterr().err


def test_half_precision_is_summed_in_float32() -> None:
    x, y = data()
    model = network().bfloat16()
    found = persample.fisher(model, loader(x.bfloat16(), y), loss_fn=losses.cross_entropy)
    assert {value.dtype for value in found.diagonal.values()} == {torch.float32}


def test_memory_for_a_few_numbers_per_weight() -> None:
    """The self-check of the first batch included; gradients of the 32 samples would be 32 times the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 1000), nn.ReLU(), nn.Linear(1000, 10))
    batches = [(torch.randn(32, 400), torch.randint(10, (32,))) for _ in range(3)]
    fisher(model, batches, loss_fn=losses.cross_entropy)  # forms of products are tried once
    peak = peak_memory(lambda: fisher(model, batches, loss_fn=losses.cross_entropy), torch.device("cpu"))
    assert peak < 10 * sum(p.nbytes for p in model.parameters())
