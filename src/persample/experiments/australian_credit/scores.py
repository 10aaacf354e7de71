"""The scores of a run, and the table of all runs on disk."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from persample.errors import DataError
from persample.experiments.australian_credit.settings import Setting
from persample.experiments.run_folder import writing


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        setting: How.
        seed: What the first weights, the order of the data and all noise are derived from.
        epochs: Passes over the training data.
    """

    setting: Setting
    seed: int
    epochs: int


@dataclass(frozen=True)
class Score:
    """The scores of one run, in nats.

    A measurement as published takes 10 draws of the weights, so that it varies by its draws. Here it is repeated.

    Attributes:
        run: The run.
        negative_elbos: Minus the evidence lower bound per training sample, once for each measurement.
        test_log_losses: −log(Σ_k Π_i p(y_i | x_i, w_k) / 10) / N over the N test rows i and 10 draws k, once for each
            measurement. That is the log loss of the test set as a whole, and more than that of the averaged
            predictions.
        averaged_log_loss: −Σ_i log(Σ_k p(y_i | x_i, w_k) / K) / N with all K draws, the usual log loss of averaged
            predictions.
    """

    run: Run
    negative_elbos: tuple[float, ...]
    test_log_losses: tuple[float, ...]
    averaged_log_loss: float


_TEXT = ("method",)
_INTEGERS = ("batch_size", "draws", "seed", "epochs")
_LISTS = ("negative_elbos", "test_log_losses")
_NUMBERS = ("averaged_log_loss",)


def write_csv(scores: Sequence[Score], path: Path) -> None:
    """Write the scores as a table of comma-separated values with a header, whole or not at all.

    Lists of numbers are separated by spaces.

    Args:
        scores: The rows, in order.
        path: The file to write; its folder exists.
    """
    with writing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*_TEXT, *_INTEGERS, *_NUMBERS, *_LISTS], extrasaction="ignore")
        writer.writeheader()
        for score in scores:
            lists = {name: " ".join(f"{value:.6f}" for value in getattr(score, name)) for name in _LISTS}
            writer.writerow(asdict(score.run.setting) | vars(score.run) | vars(score) | lists)


def read_csv(path: Path) -> list[Score]:
    """Read what `write_csv` wrote; nothing if there is no such file.

    Raises:
        DataError: It is another kind of file.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [_score(row) for row in csv.DictReader(file)]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not a table of scores ({error!r}): remove it, or choose another --out") from error


def _score(row: dict[str, str]) -> Score:
    batch_size, draws, seed, epochs = (int(row[name]) for name in _INTEGERS)
    setting = Setting(row["method"], batch_size, draws)  # type: ignore[arg-type]
    negative_elbos, test_log_losses = (tuple(map(float, row[name].split())) for name in _LISTS)
    return Score(Run(setting, seed, epochs), negative_elbos, test_log_losses, float(row["averaged_log_loss"]))
