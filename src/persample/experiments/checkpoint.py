"""Save a run as tensors and plain values, and go on from there."""

from __future__ import annotations

import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from persample.errors import DataError, OptionError
from persample.experiments.layers import LayerRecord
from persample.experiments.metrics import Metrics
from persample.experiments.records import Record
from persample.experiments.run import Run
from persample.files import replacing
from persample.vogn import LayerDiagnostics

_KEYS = {"config", "epoch", "model", "optimizer", "records", "layers"}


def save(run: Run, path: Path) -> None:
    """Write the run to a file, whole or not at all.

    The file holds only tensors, numbers, strings and containers of them: `torch.load(path, weights_only=True)`
    reads it. VOGN's curvature and the state of its noise are in `optimizer`.

    Args:
        run: The run, between two epochs.
        path: The file; its folder exists.
    """
    state = {
        "config": run.config.as_dict(),
        "epoch": run.epoch,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "records": [asdict(record) for record in run.records],
        "layers": [asdict(record) for record in run.layers],
    }
    with replacing(path) as temporary:
        torch.save(state, temporary)


def restore(run: Run, path: Path) -> None:
    """Put a run that has just begun into the state that was saved.

    Args:
        run: A run with the settings of the saved one; with a constant learning rate the number of epochs may be
            another one.
        path: The file that `save` wrote.

    Raises:
        DataError: There is no such file, or it is not a whole checkpoint.
        OptionError: The settings differ, or all epochs are done already.
    """
    state = _load(path)
    _check_same_settings(run, state["config"], path)
    if state["epoch"] > run.config.epochs:
        raise OptionError(
            f"{path} has {state['epoch']} epochs done, more than the {run.config.epochs} asked for; ask for more epochs"
        )
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.epoch = state["epoch"]
    run.records = [Record(**{**row, "metrics": Metrics(**row["metrics"])}) for row in state["records"]]
    run.layers = [
        LayerRecord(**{**row, "diagnostics": LayerDiagnostics(**row["diagnostics"])}) for row in state["layers"]
    ]


def _load(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DataError(f"there is no run to resume at {path}; start one without --resume") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise DataError(f"{path} cannot be read as a checkpoint ({error}); start again without --resume") from error
    if not isinstance(state, dict) or not state.keys() >= _KEYS:
        raise DataError(f"{path} is not a checkpoint of a training run; start again without --resume")
    return state


def _check_same_settings(run: Run, saved: dict[str, Any], path: Path) -> None:
    own = run.config.as_dict()
    free = {"epochs"} if run.config.schedule == "constant" else set()
    different = [name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name)]
    if refused := sorted(set(different) - free):
        changes = ", ".join(f"{name} was {saved.get(name)!r} and is now {own.get(name)!r}" for name in refused)
        raise OptionError(f"{path} belongs to a run with other settings: {changes}; resume with the same settings")
