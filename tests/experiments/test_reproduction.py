from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch

import persample
from persample.errors import DataError, OptionError, UnknownBackendError
from persample.experiments.config import TrainConfig
from persample.experiments.data.published import PUBLISHED, PublishedDataset
from persample.experiments.recipes import configure
from persample.experiments.records import Record
from persample.experiments.reproduction import reproduce


@pytest.fixture
def data_dir(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_mnist: PublishedDataset, mnist_files: dict[str, bytes]
) -> Path:
    """A folder with a tiny data set, known by the name of MNIST."""
    monkeypatch.setitem(PUBLISHED, "mnist", tiny_mnist)
    (tmp_path / "data" / "mnist").mkdir(parents=True)
    for name, content in mnist_files.items():
        (tmp_path / "data" / "mnist" / name).write_bytes(content)
    return tmp_path / "data"


def both(**changes: Any) -> list[TrainConfig]:
    run = {"epochs": 2, "batch_size": 3, "evaluate_every": 1}
    return [
        configure("mnist", "adam", **run),
        configure("mnist", "vogn", train_draws=1, test_draws=2, hess_init=1.0, **run, **changes),
    ]


def test_writes_everything_down(data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "some" / "folder"

    outcome = reproduce(both(), out, data_dir=data_dir)

    assert sorted(path.name for path in out.iterdir()) == [
        "adam.pt",
        "config.json",
        "diagnostics.csv",
        "figure2.png",
        "metrics.csv",
        "vogn.pt",
    ]
    assert outcome.figure == out / "figure2.png"
    assert matplotlib.image.imread(outcome.figure).ndim == 3
    with (out / "metrics.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(outcome.records) == 4 + 8
    described = json.loads((out / "config.json").read_text())
    assert [run["optimizer"] for run in described["runs"]] == ["adam", "vogn"]
    assert described["runs"][1] == both()[1].as_dict()
    assert described["versions"]["persample"] == persample.__version__
    assert described["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("backend", ["loop", "vmap"])
def test_every_backend_learns_the_same(data_dir: Path, tmp_path: Path, backend: str) -> None:
    hooks = reproduce(both(), tmp_path / "hooks", data_dir=data_dir).records
    other = reproduce(both(backend=backend), tmp_path / "other", data_dir=data_dir).records

    for one, two in zip(hooks, other, strict=True):
        assert one.metrics.log_loss == pytest.approx(two.metrics.log_loss, rel=1e-3)


def test_holds_training_samples_out_in_place_of_the_test_data(data_dir: Path, tmp_path: Path) -> None:
    configs = [replace(config, validation=2) for config in both()]

    records = reproduce(configs, tmp_path / "out", data_dir=data_dir).records

    assert {record.split for record in records} == {"train", "validation"}


class StopError(Exception):
    """Interrupt an experiment."""


class Interrupter:
    def __init__(self, optimizer: str, epoch: int) -> None:
        self.moment = (optimizer, epoch)

    def on_batch(self, config: TrainConfig, epoch: int, batch: int, batches: int, loss: float) -> None:
        if (config.optimizer, epoch) == self.moment:
            raise StopError

    def on_epoch(self, config: TrainConfig, epoch: int, records: list[Record]) -> None:
        pass


@pytest.mark.parametrize("moment", [("adam", 2), ("vogn", 1), ("vogn", 2)])
def test_goes_on_where_it_was_interrupted(data_dir: Path, tmp_path: Path, moment: tuple[str, int]) -> None:
    reproduce(both(), tmp_path / "straight", data_dir=data_dir)
    with pytest.raises(StopError):
        reproduce(both(), tmp_path / "out", data_dir=data_dir, watcher=Interrupter(*moment))
    assert not (tmp_path / "out" / "metrics.csv").exists()

    reproduce(both(), tmp_path / "out", data_dir=data_dir, resume=True)

    for name in ("metrics.csv", "diagnostics.csv", "figure2.png"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_writes_for_tensorboard(data_dir: Path, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for overwrite in (False, True):  # the second replaces the first
        records = reproduce(both(), tmp_path / "out", data_dir=data_dir, tensorboard=True, overwrite=overwrite).records
    read = events.EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    read.Reload()
    expected = [
        r.metrics.accuracy for r in records if (r.optimizer, r.split, r.prediction) == ("adam", "test", "point")
    ]
    assert [e.value for e in read.Scalars("adam/test/point/accuracy")] == pytest.approx(expected)
    assert [e.step for e in read.Scalars("vogn/0.weight/effective_lr")] == list(range(1, len(expected) + 1))
    assert not list((tmp_path / "out").glob(".partial*"))


def test_a_new_experiment_forgets_the_old_one(data_dir: Path, tmp_path: Path) -> None:
    reproduce(both(), tmp_path / "out", data_dir=data_dir)
    with pytest.raises(StopError):
        reproduce(both(), tmp_path / "out", data_dir=data_dir, overwrite=True, watcher=Interrupter("adam", 1))

    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


def test_refuses_before_anything_is_trained_or_lost(data_dir: Path, tmp_path: Path) -> None:
    reproduce(both(), tmp_path / "out", data_dir=data_dir)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    with pytest.raises(DataError, match=r"earlier experiment.*--resume.*--overwrite.*--out"):
        reproduce(both(), tmp_path / "out", data_dir=data_dir)
    with pytest.raises(UnknownBackendError, match="nobody"):
        reproduce(both(backend="nobody"), tmp_path / "out", data_dir=data_dir, overwrite=True)
    with pytest.raises(OptionError, match=r"decay was 0\.\d+ and is now 0\.5"):
        reproduce(both(decay=0.5), tmp_path / "out", data_dir=data_dir, resume=True)

    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_says_that_there_is_nothing_to_resume(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no run to resume in .*nowhere; start one without --resume"):
        reproduce(both(), tmp_path / "nowhere", data_dir=data_dir, resume=True)

    assert not (tmp_path / "nowhere").exists()


def test_says_that_the_folder_cannot_be_made(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(DataError, match="file/out cannot be made: Not a directory; choose another --out"):
        reproduce(both(), tmp_path / "file" / "out", data_dir=data_dir)


def test_another_run_into_the_same_folder_is_refused(data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    class Second(Interrupter):
        """Starts another run in the middle of the first."""

        def on_epoch(self, config: TrainConfig, epoch: int, records: list[Record]) -> None:
            for options in ({}, {"resume": True}, {"overwrite": True}):
                with pytest.raises(DataError, match="another command is writing"):
                    reproduce(both(), out, data_dir=data_dir, **options)  # type: ignore[arg-type]

    reproduce(both(), out, data_dir=data_dir, watcher=Second("nobody", 0))
    assert "figure2.png" in [path.name for path in out.iterdir()]


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}])
def test_what_killed_runs_had_begun_is_removed(data_dir: Path, tmp_path: Path, options: dict[str, bool]) -> None:
    reproduce(both(), tmp_path / "out", data_dir=data_dir)
    before = {path.name for path in (tmp_path / "out").iterdir()}
    for name in (".adam-k1ll3d00.pt", ".vogn-k1ll3d00.pt", ".config-k1ll3d00.json", ".metrics-k1ll3d00.csv"):
        (tmp_path / "out" / name).write_text("half")
    (tmp_path / "out" / ".partial-k1ll3d00").mkdir()

    reproduce(both(), tmp_path / "out", data_dir=data_dir, **options)  # type: ignore[arg-type]

    assert {path.name for path in (tmp_path / "out").iterdir()} == before


def test_runs_with_other_optimizers_are_not_mixed(data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    reproduce(both(), out, data_dir=data_dir)
    adam = both()[:1]

    for name in ("metrics.csv", "diagnostics.csv", "figure2.png"):  # as after an interrupt
        (out / name).unlink()
    with pytest.raises(DataError, match=r"earlier experiment \(adam.pt, vogn.pt\)"):
        reproduce(adam, out, data_dir=data_dir)
    with pytest.raises(DataError, match=r"also holds vogn\.pt, from an experiment with both optimizers"):
        reproduce(adam, out, data_dir=data_dir, resume=True)
    reproduce(adam, out, data_dir=data_dir, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["adam.pt", "config.json", "figure2.png", "metrics.csv"]
    reproduce(both(), out, data_dir=data_dir, resume=True)
    assert (out / "vogn.pt").exists()
