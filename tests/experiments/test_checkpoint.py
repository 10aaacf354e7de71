from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from persample.errors import DataError, OptionError
from persample.experiments.checkpoint import restore, save
from persample.experiments.layers import layer_records
from persample.experiments.metrics import Metrics
from persample.experiments.recipes import configure
from persample.experiments.records import Record
from persample.experiments.run import Run, start


def begin(optimizer: str = "adam", **changes: Any) -> Run:
    return start(configure("mnist-5k", optimizer, **{"epochs": 4, "schedule": "cosine"} | changes), 40)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    run = begin()
    run.epoch = 3
    save(run, tmp_path / "run.pt")
    return tmp_path / "run.pt"


@pytest.mark.parametrize("optimizer", ["adam", "vogn"])
def test_holds_nothing_but_tensors_and_plain_values(optimizer: str, tmp_path: Path) -> None:
    run = begin(optimizer)
    run.records = [Record("adam", 1, "train", "point", Metrics(1 / 3, 0.5, 0.25))]
    run.layers = layer_records("vogn", 1, begin("vogn").optimizer)

    save(run, tmp_path / "run.pt")

    state = torch.load(tmp_path / "run.pt", weights_only=True)
    assert state["config"] == run.config.as_dict()
    assert state["model"].keys() == run.model.state_dict().keys()
    again = begin(optimizer)
    restore(again, tmp_path / "run.pt")
    assert again.records == run.records
    assert again.layers == run.layers


def test_refuses_other_settings(saved: Path) -> None:
    with pytest.raises(OptionError, match=r"batch_size was 64 and is now 5, lr was 0\.\d+ and is now 0\.5; resume"):
        restore(begin(lr=0.5, batch_size=5), saved)
    with pytest.raises(OptionError, match=r"optimizer was 'adam' and is now 'vogn'"):
        restore(begin("vogn"), saved)


def test_the_number_of_epochs_may_change_where_the_learning_rate_does_not_depend_on_it(
    saved: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match="epochs was 4 and is now 5"):
        restore(begin(epochs=5), saved)
    constant = begin(schedule="constant")
    constant.epoch = 4
    save(constant, tmp_path / "constant.pt")

    longer = begin(schedule="constant", epochs=9)
    restore(longer, tmp_path / "constant.pt")

    assert longer.epoch == 4
    with pytest.raises(OptionError, match="has 4 epochs done, more than the 2 asked for"):
        restore(begin(schedule="constant", epochs=2), tmp_path / "constant.pt")


def test_says_that_there_is_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no run to resume at .*none\.pt; start one without --resume"):
        restore(begin(), tmp_path / "none.pt")


@pytest.mark.parametrize("length", [0, 10, 1000, -1])
def test_refuses_damaged_files(saved: Path, length: int) -> None:
    saved.write_bytes(saved.read_bytes()[:length])

    with pytest.raises(DataError, match=r"run\.pt cannot be read as a checkpoint"):
        restore(begin(), saved)


@pytest.mark.parametrize("content", [{"model": {}}, [1, 2], torch.zeros(3)])
def test_refuses_files_that_are_something_else(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "run.pt")

    with pytest.raises(DataError, match="is not a checkpoint of a training run"):
        restore(begin(), tmp_path / "run.pt")


class Harmless:
    """Stands for code that a pickle could bring."""


def test_never_runs_code_from_a_file(tmp_path: Path) -> None:
    torch.save(Harmless(), tmp_path / "run.pt")

    with pytest.raises(DataError, match="cannot be read as a checkpoint"):
        restore(begin(), tmp_path / "run.pt")


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(model={}),
        lambda state: state.update(optimizer={"state": 3}),
        lambda state: state.update(records=[{"epoch": 1}]),
        lambda state: state.update(layers=3),
        lambda state: state.update(config=3),
        lambda state: state.update(epoch="three"),
    ],
)
def test_refuses_a_checkpoint_that_holds_something_else(saved: Path, change: Any) -> None:
    state = torch.load(saved, weights_only=True)
    change(state)
    torch.save(state, saved)

    with pytest.raises(
        DataError, match=r"run\.pt (cannot be read as|is not) a checkpoint .*start again with --overwrite"
    ):
        restore(begin(), saved)
