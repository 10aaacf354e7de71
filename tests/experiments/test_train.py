from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import persample
from persample import losses
from persample.errors import NonFiniteLossError, OptionError, UnknownBackendError
from persample.experiments.checkpoint import restore
from persample.experiments.config import TrainConfig
from persample.experiments.data import ImageDataset, hold_out, load_dataset
from persample.experiments.models import mnist_convnet
from persample.experiments.recipes import configure
from persample.experiments.records import Record
from persample.experiments.run import Run, start
from persample.experiments.seeds import make_generator
from persample.experiments.train import learning_rate, shuffled_batches, train


def small(optimizer: str, **changes: Any) -> TrainConfig:
    """Return settings for 3 epochs of 3 batches, the last one smaller."""
    if optimizer == "vogn":
        changes = {"momentum": 0.9, "mc_samples": 2, "train_draws": 2, "test_draws": 2} | changes
    return configure("mnist-5k", optimizer, **{"epochs": 3, "batch_size": 16, "schedule": "cosine"} | changes)


def trained(config: TrainConfig, dataset: ImageDataset, path: Path) -> Run:
    run = start(config, len(dataset.train_targets))
    train(run, dataset, path)
    return run


def same_weights(one: Run, other: Run) -> bool:
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return all(a.equal(b) for a, b in pairs)


def same_state(one: Any, other: Any) -> bool:
    """Compare nested containers bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.equal(other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_state(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_state, one, other))
    return one == other


class StopError(Exception):
    """Interrupt a run in the middle of an epoch."""


class Interrupter:
    def on_batch(self, config: TrainConfig, epoch: int, batch: int, batches: int, loss: float) -> None:
        if (epoch, batch) == (2, 2):
            raise StopError

    def on_epoch(self, config: TrainConfig, epoch: int, records: list[Record]) -> None:
        pass


@pytest.mark.parametrize("optimizer", ["adam", "vogn"])
def test_equal_settings_end_with_equal_weights(optimizer: str, digits: ImageDataset, tmp_path: Path) -> None:
    torch.manual_seed(1)
    one = trained(small(optimizer), digits, tmp_path / "one.pt")
    torch.manual_seed(2)
    two = trained(small(optimizer), digits, tmp_path / "two.pt")
    other = trained(small(optimizer, seed=1), digits, tmp_path / "other.pt")

    assert same_weights(one, two)
    assert one.records == two.records
    assert not same_weights(one, other)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("optimizer", ["adam", "vogn"])
def test_an_interrupted_run_ends_as_if_it_was_not(
    optimizer: str, schedule: str, digits: ImageDataset, tmp_path: Path
) -> None:
    config = small(optimizer, schedule=schedule)
    straight = trained(config, digits, tmp_path / "straight.pt")
    interrupted = start(config, len(digits.train_targets))
    with pytest.raises(StopError):
        train(interrupted, digits, tmp_path / "run.pt", Interrupter())

    resumed = start(config, len(digits.train_targets))
    restore(resumed, tmp_path / "run.pt")
    assert resumed.epoch == 1
    train(resumed, digits, tmp_path / "run.pt")

    assert same_weights(straight, resumed)
    assert same_state(straight.optimizer.state_dict(), resumed.optimizer.state_dict())
    assert straight.records == resumed.records


def test_how_it_is_measured_does_not_change_the_training(digits: ImageDataset, tmp_path: Path) -> None:
    few = trained(small("vogn"), digits, tmp_path / "few.pt")
    many = trained(small("vogn", train_draws=3, test_draws=5), digits, tmp_path / "many.pt")

    assert same_weights(few, many)
    assert few.records != many.records


def test_adam_is_the_ordinary_loop(digits: ImageDataset, tmp_path: Path) -> None:
    config = small("adam", schedule="constant", lr=0.01)
    run = start(config, len(digits.train_targets))
    model = mnist_convnet()
    model.load_state_dict(run.model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for epoch in (1, 2, 3):
        for rows in shuffled_batches(config, epoch, len(digits.train_targets)):
            optimizer.zero_grad()
            outputs = model(digits.train_inputs[rows])
            torch.nn.functional.cross_entropy(outputs, digits.train_targets[rows]).backward()
            optimizer.step()

    train(run, digits, tmp_path / "run.pt")

    for expected, found in zip(model.parameters(), run.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_both_optimizers_begin_at_the_same_weights() -> None:
    assert same_weights(start(small("adam"), 40), start(small("vogn"), 40))


@pytest.mark.parametrize("optimizer", ["adam", "vogn"])
def test_learns(optimizer: str, digits: ImageDataset, tmp_path: Path) -> None:
    # So few images weigh little against the prior: make it weak, and the posterior narrow by the first curvature.
    changes = {"prior_precision": 0.1, "hess_init": 10.0, "lr": 3.0, "mc_samples": 1} if optimizer == "vogn" else {}
    run = trained(small(optimizer, epochs=40, **changes), digits, tmp_path / "run.pt")

    losses_on_train = [r.metrics.log_loss for r in run.records if r.split == "train"]
    assert losses_on_train[-1] < math.log(10) / 2


def test_leaves_the_global_random_generator_alone(digits: ImageDataset, tmp_path: Path) -> None:
    before = torch.get_rng_state()

    trained(small("vogn", epochs=1), digits, tmp_path / "run.pt")

    assert torch.get_rng_state().equal(before)


def test_tells_of_every_batch_and_epoch(digits: ImageDataset, tmp_path: Path) -> None:
    batches: list[tuple[int, int, int]] = []
    epochs: list[tuple[int, int]] = []

    class Notebook:
        def on_batch(self, config: TrainConfig, epoch: int, batch: int, batches_: int, loss: float) -> None:
            assert loss > 0
            batches.append((epoch, batch, batches_))

        def on_epoch(self, config: TrainConfig, epoch: int, records: list[Record]) -> None:
            assert (tmp_path / "run.pt").exists()
            epochs.append((epoch, len(records)))

    train(start(small("adam"), len(digits.train_targets)), digits, tmp_path / "run.pt", Notebook())

    assert batches == [(epoch, batch, 3) for epoch in (1, 2, 3) for batch in (1, 2, 3)]
    assert epochs == [(1, 2), (2, 4), (3, 6)]


def test_measures_train_and_test_in_every_way(digits: ImageDataset, tmp_path: Path) -> None:
    adam = trained(small("adam", epochs=1), digits, tmp_path / "adam.pt").records
    vogn = trained(small("vogn", epochs=2), digits, tmp_path / "vogn.pt").records

    assert [(r.optimizer, r.epoch, r.split, r.prediction) for r in adam] == [
        ("adam", 1, "train", "point"),
        ("adam", 1, "test", "point"),
    ]
    assert [(r.optimizer, r.epoch, r.split, r.prediction) for r in vogn] == [
        ("vogn", epoch, split, prediction)
        for epoch in (1, 2)
        for split in ("train", "test")
        for prediction in ("mean", "averaged")
    ]


@pytest.mark.parametrize(("every", "measured"), [(2, [2, 3]), (3, [3]), (5, [3])])
def test_measures_after_some_epochs_and_the_last(
    digits: ImageDataset, tmp_path: Path, every: int, measured: list[int]
) -> None:
    often = trained(small("adam"), digits, tmp_path / "often.pt").records

    seldom = trained(small("adam", evaluate_every=every), digits, tmp_path / "seldom.pt").records

    assert seldom == [record for record in often if record.epoch in measured]


def test_held_out_data_are_measured_as_what_they_are(digits: ImageDataset, tmp_path: Path) -> None:
    split = hold_out(digits, 10, make_generator(0, "validation"))

    records = trained(small("adam", epochs=1), split, tmp_path / "run.pt").records

    assert [(record.split, record.prediction) for record in records] == [("train", "point"), ("validation", "point")]


def test_every_setting_of_vogn_reaches_it() -> None:
    settings = {"damping": 0.01, "temperature": 0.5, "temperature_start": 0.1, "temperature_steps": 7, "decay": 0.9}

    optimizer = start(small("vogn", **settings), 40).optimizer

    assert {name: optimizer.defaults[name] for name in settings} == settings
    assert optimizer.mc_samples == 2


def test_says_that_adam_diverged(digits: ImageDataset, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match=r"loss of adam became \w+ in epoch 1.*rate below 1e\+30"):
        trained(small("adam", lr=1e30), digits, tmp_path / "run.pt")


def test_refuses_settings_before_it_begins() -> None:
    with pytest.raises(UnknownBackendError, match="nobody"):
        start(small("vogn", backend="nobody"), 40)
    with pytest.raises(OptionError, match="order"):
        start(small("vogn", order="sideways"), 40)


def test_every_sample_comes_once_an_epoch_in_a_new_order() -> None:
    config = small("adam", batch_size=7)
    first, second = (shuffled_batches(config, epoch, 30) for epoch in (1, 2))

    assert [len(rows) for rows in first] == [7, 7, 7, 7, 2]
    assert torch.cat(first).sort().values.tolist() == list(range(30))
    assert torch.cat(second).sort().values.tolist() == list(range(30))
    assert not torch.cat(first).equal(torch.cat(second))
    assert torch.cat(first).tolist() != list(range(30))


def test_the_cosine_falls_from_the_learning_rate_to_nearly_zero() -> None:
    config = small("adam", lr=0.5)

    rates = [learning_rate(config, step, 100) for step in range(100)]

    assert rates[0] == 0.5
    assert rates[50] == pytest.approx(0.25)
    assert rates[25] == pytest.approx(0.5 * math.cos(math.pi / 8) ** 2)
    assert 0 < rates[99] < 0.001
    assert rates == sorted(rates, reverse=True)


def test_the_constant_rate_is_constant() -> None:
    config = small("adam", lr=0.5, schedule="constant")

    assert {learning_rate(config, step, 100) for step in range(100)} == {0.5}


def test_the_loss_is_the_mean_over_the_samples(digits: ImageDataset, tmp_path: Path) -> None:
    seen: list[float] = []
    run = start(small("adam", epochs=1, batch_size=40), len(digits.train_targets))
    with torch.no_grad():
        expected = losses.cross_entropy(run.model(digits.train_inputs), digits.train_targets).mean().item()

    class Notebook:
        def on_batch(self, config: TrainConfig, epoch: int, batch: int, batches: int, loss: float) -> None:
            seen.append(loss)

        def on_epoch(self, config: TrainConfig, epoch: int, records: list[Record]) -> None:
            pass

    train(run, digits, tmp_path / "run.pt", Notebook())

    assert seen == [pytest.approx(expected, rel=1e-5)]


@pytest.mark.parametrize(("name", "model_inputs"), [("mnist", (1, 28, 28)), ("cifar10", (3, 32, 32))])
def test_begins_on_the_full_data_with_every_backend(
    name: str, model_inputs: tuple[int, int, int], real_data: Path, tmp_path: Path
) -> None:
    dataset = load_dataset(name, real_data)
    assert dataset.train_inputs.shape[1:] == model_inputs
    first_losses: dict[str, list[float]] = {}

    class FourBatches:
        def on_batch(self, config: TrainConfig, epoch: int, batch: int, batches: int, loss: float) -> None:
            assert batches == len(dataset.train_targets) / 100
            first_losses.setdefault(config.settings.backend, []).append(loss)
            if batch == 4:
                raise StopError

        def on_epoch(self, config: TrainConfig, epoch: int, records: list[Record]) -> None:
            raise AssertionError

    for backend in persample.backends().values():
        if backend.available:
            config = configure(name, "vogn", batch_size=100, backend=backend.name)
            with pytest.raises(StopError):
                train(start(config, len(dataset.train_targets)), dataset, tmp_path / "run.pt", FourBatches())

    for found in first_losses.values():
        assert found == pytest.approx(first_losses["loop"], rel=1e-4)
