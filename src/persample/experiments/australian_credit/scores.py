"""What a run reached, and the table of all runs on disk."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from persample.errors import DataError
from persample.experiments.australian_credit.settings import Setting
from persample.files import replacing


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
    """What one run reached, in nats.

    Attributes:
        run: The run.
        negative_elbo: Minus the evidence lower bound per training sample, from 10 draws, as published.
        test_log_loss: −log(Σ_k Π_i p(y_i | x_i, w_k) / 10) / N over the N test rows i and 10 draws k, as published.
            That is the log loss of the test set as a whole, and more than that of the averaged predictions.
        precise_negative_elbo: As `negative_elbo`, from 1000 draws.
        averaged_log_loss: −Σ_i log(Σ_k p(y_i | x_i, w_k) / 1000) / N, the usual log loss of averaged predictions.
    """

    run: Run
    negative_elbo: float
    test_log_loss: float
    precise_negative_elbo: float
    averaged_log_loss: float


_TEXT = ("method",)
_INTEGERS = ("batch_size", "draws", "seed", "epochs")
_NUMBERS = ("negative_elbo", "test_log_loss", "precise_negative_elbo", "averaged_log_loss")


def write_csv(scores: Sequence[Score], path: Path) -> None:
    """Write the scores as a table of comma-separated values with a header, whole or not at all.

    Args:
        scores: The rows, in order.
        path: The file to write; its folder exists.
    """
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*_TEXT, *_INTEGERS, *_NUMBERS], extrasaction="ignore")
        writer.writeheader()
        for score in scores:
            writer.writerow(asdict(score.run.setting) | vars(score.run) | vars(score))


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
    return Score(Run(setting, seed, epochs), *(float(row[name]) for name in _NUMBERS))
