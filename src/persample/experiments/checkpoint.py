"""Saving a run as tensors and plain values, and resuming it."""

from __future__ import annotations

import io
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from persample.errors import DataError, OptionError, PersampleError
from persample.experiments.layers import LayerRecord
from persample.experiments.metrics import Metrics
from persample.experiments.records import Record
from persample.experiments.run import Run
from persample.experiments.run_folder import writing
from persample.vogn import LayerDiagnostics

_KEYS = {"config", "epoch", "model", "optimizer", "records", "layers"}


def save(run: Run, path: Path) -> None:
    """Write the run to a file, whole or not at all.

    The file holds only tensors, numbers, strings and containers of them: `torch.load(path, weights_only=True)`
    reads it. VOGN's curvature and the state of its noise are in `optimizer`.

    Args:
        run: The run, between two epochs.
        path: The file; its folder exists.

    Raises:
        DataError: It cannot be written.
    """
    state = {
        "config": run.config.as_dict(),
        "epoch": run.epoch,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "records": [asdict(record) for record in run.records],
        "layers": [asdict(record) for record in run.layers],
    }
    content = io.BytesIO()
    torch.save(state, content)  # to a full disk it would write half, and raise a RuntimeError
    with writing(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def restore(run: Run, path: Path) -> None:
    """Restore a saved state into a run that has just begun.

    Args:
        run: A run with the settings of the saved one; with a constant learning rate the number of epochs may be
            another one.
        path: The file that `save` wrote.

    Raises:
        DataError: There is no such file, or it is not a whole checkpoint.
        OptionError: The settings differ, or all epochs are done already.
    """
    state = _load(path)
    _require_same_settings(run, state["config"], path)
    if state["epoch"] > run.config.epochs:
        raise OptionError(
            f"{path} has {state['epoch']} epochs done, more than the {run.config.epochs} asked for; ask for more epochs"
        )
    try:
        run.model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.epoch = state["epoch"]
        run.records = [Record(**{**row, "metrics": Metrics(**row["metrics"])}) for row in state["records"]]
        run.layers = [
            LayerRecord(**{**row, "diagnostics": LayerDiagnostics(**row["diagnostics"])}) for row in state["layers"]
        ]
    except (PersampleError, LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise _damaged(path, error) from error


def _load(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DataError(f"there is no run to resume at {path}; start one without --resume") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise _damaged(path, error) from error
    whole = isinstance(state, dict) and state.keys() >= _KEYS
    if not (whole and isinstance(state["config"], dict) and isinstance(state["epoch"], int)):
        raise DataError(f"{path} is not a checkpoint of a training run; start again with --overwrite")
    found: dict[str, Any] = state
    return found


def _damaged(path: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())
    return DataError(f"{path} cannot be read as a checkpoint ({reason}); start again with --overwrite")


def _require_same_settings(run: Run, saved: dict[str, Any], path: Path) -> None:
    own = run.config.as_dict()
    free = {"epochs"} if run.config.schedule == "constant" else set()
    different = [name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name)]
    if refused := sorted(set(different) - free):
        changes = ", ".join(f"{name} was {saved.get(name)!r} and is now {own.get(name)!r}" for name in refused)
        raise OptionError(f"{path} belongs to a run with other settings: {changes}; resume with the same settings")
