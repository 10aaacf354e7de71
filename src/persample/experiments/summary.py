"""Summarising runs that differ only in their seeds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from persample.errors import DataError, OptionError
from persample.experiments.records import Record, read_csv


def last_records(folders: Sequence[Path]) -> list[list[Record]]:
    """Return the metrics of each run after its last epoch, in the same order.

    Args:
        folders: The folders that `reproduce` or `train` wrote to, one for each seed.

    Raises:
        DataError: A folder holds no finished run, or a damaged one.
        OptionError: The runs have the same seed, or differ in more than the seed.
    """
    settings = [_settings(folder) for folder in folders]
    seeds = [[run.pop("seed") for run in runs] for runs in settings]
    for folder, own, seed in zip(folders[1:], settings[1:], seeds[1:], strict=True):
        if own != settings[0]:
            raise OptionError(
                f"the settings in {folder / 'config.json'} differ from those in {folders[0] / 'config.json'}: only "
                "runs that differ in nothing but the seed can be summarised"
            )
        if seeds.count(seed) > 1:
            raise OptionError(f"the seed of {folder} was used twice, so these runs are the same; give each its own")
    runs = [_last(folder / "metrics.csv") for folder in folders]
    measured = [[(record.optimizer, record.split, record.prediction) for record in run] for run in runs]
    for folder, rows in zip(folders, measured, strict=True):
        if rows != measured[0]:
            raise DataError(f"{folder} and {folders[0]} have different metrics: run one of them again")
    return runs


def _settings(folder: Path) -> list[dict[str, Any]]:
    path = _existing(folder / "config.json")
    with _damaged(path):
        runs: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["runs"]
        return [{"seed": run["seed"]} | run for run in runs]


def _last(path: Path) -> list[Record]:
    """Return the metrics after the last epoch."""
    _existing(path)
    with _damaged(path):
        records = read_csv(path)
        last = records[-1].epoch
        return [record for record in records if record.epoch == last]


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"there is no {path}: the run has not finished, or it wrote to another folder")
    return path


@contextmanager
def _damaged(path: Path) -> Iterator[None]:
    """Turn errors in reading a run's file into one that names the file.

    Raises:
        DataError: Reading it fails.
    """
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        raise DataError(
            f"{path} is not a file of a run, or is damaged ({error!r}): run it again (--overwrite)"
        ) from error
