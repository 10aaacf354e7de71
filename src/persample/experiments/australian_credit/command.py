"""The command `persample australian`: runs that are left, several at a time, and the file of their scores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from persample.errors import DataError, OptionError
from persample.experiments.australian_credit.scores import Run, Score, read_csv, write_csv
from persample.experiments.australian_credit.settings import METHODS, PUBLISHED
from persample.experiments.australian_credit.train import train_all
from persample.experiments.data.australian import load_australian
from persample.experiments.run_folder import held, remove_begun
from persample.files import at_home


def compare(
    *,
    methods: Sequence[str],
    data_dir: Path | None,
    seeds: int,
    jobs: int | None,
    epochs: int | None,
    out: Path,
    resume: bool,
    overwrite: bool,
    console: Console,
) -> tuple[list[Score], Path]:
    """Return the scores of the published settings, and the file in which they are.

    Args:
        methods: Which of `METHODS`.
        data_dir: The folder of the data sets.
        seeds: How many runs each setting has.
        jobs: How many at a time; None is one for each core.
        epochs: Passes over the data; None is what each setting has.
        out: The folder of the results.
        resume: Whether runs whose scores are there are left out.
        overwrite: Whether scores that are there are replaced.
        console: Where progress is shown.

    Raises:
        OptionError: No method has such a name.
        DataError: There are scores, and nothing says what to do with them.
    """
    if unknown := [name for name in methods if name not in METHODS]:
        raise OptionError(f"no method is called {unknown[0]!r}; choose among {', '.join(METHODS)}")
    runs = [
        Run(setting, seed, epochs or setting.epochs)
        for setting in PUBLISHED
        if setting.method in methods
        for seed in range(seeds)
    ]
    path = at_home(out) / "scores.csv"
    with held(path.parent):
        if path.exists() and not (resume or overwrite):
            raise DataError(
                f"{path} exists: continue it (--resume), replace it (--overwrite), or choose another folder (--out)"
            )
        return _scores(runs, path, data_dir, jobs or os.cpu_count() or 1, resume, console), path


def _scores(
    runs: list[Run], path: Path, data_dir: Path | None, jobs: int, resume: bool, console: Console
) -> list[Score]:
    """Return the scores of `runs`, reusing those in `path` if resuming, and write them there."""
    data = load_australian(data_dir)
    remove_begun([path])
    done = {score.run: score for score in read_csv(path)} if resume else {}
    left = [run for run in runs if run not in done]
    training = train_all(left, data, jobs=jobs)
    for score in track(training, "Training", total=len(left), console=console, disable=not console.is_terminal):
        done[score.run] = score
        write_csv(list(done.values()), path)
    scores = [done[run] for run in runs]
    write_csv(scores, path)
    return scores
