"""Several runs with the same settings and different seeds, taken together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from persample.errors import DataError, OptionError
from persample.experiments.records import Record, read_csv


def last_records(folders: Sequence[Path]) -> list[list[Record]]:
    """Return what each run measured after its last epoch, all in the same order.

    Args:
        folders: The folders that `reproduce` or `train` wrote to, one for each seed.

    Raises:
        DataError: A folder holds no finished run.
        OptionError: The runs have the same seed, or differ in more than the seed.
    """
    settings = [_settings(folder) for folder in folders]
    seeds = [[run.pop("seed") for run in runs] for runs in settings]
    for folder, own, seed in zip(folders[1:], settings[1:], seeds[1:], strict=True):
        if own != settings[0]:
            raise OptionError(
                f"the settings in {folder / 'config.json'} are not those in {folders[0] / 'config.json'}: only runs "
                "that differ in nothing but the seed can be summed up"
            )
        if seeds.count(seed) > 1:
            raise OptionError(f"the seed of {folder} was used twice, so these runs are the same; give each its own")
    runs = [_read(folder / "metrics.csv") for folder in folders]
    return [[record for record in run if record.epoch == run[-1].epoch] for run in runs]


def _settings(folder: Path) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = json.loads(_existing(folder / "config.json").read_text(encoding="utf-8"))["runs"]
    return runs


def _read(path: Path) -> list[Record]:
    return read_csv(_existing(path))


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"there is no {path}: the run was not finished, or it wrote to another folder")
    return path
