"""The command `persample contest`, also where neither typer nor rich is installed."""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from persample.errors import DataError, OptionError
from persample.experiments.contest.costs import step_costs
from persample.experiments.contest.pool import performed, prepare
from persample.experiments.contest.report import draw, read_json, settings_table, table, write_csv, write_json
from persample.experiments.contest.running import Place, course_of
from persample.experiments.contest.settings import BUDGETS, SMALL, Budget
from persample.experiments.contest.tasks import SEEDS, Result, Results, Task, plan
from persample.experiments.data.load import DATASET_TITLES
from persample.experiments.run_folder import held, writing
from persample.files import at_home

#: What the options of the command line are, by the arguments of `contest`.
HELP = {
    "out": "Folder of the results; tasks with results there are not repeated.",
    "data_dir": "Folder of the data sets. [default: $PERSAMPLE_DATA, then a download]",
    "datasets": "A data set; repeat the option for several. [default: all]",
    "devices": "Devices, each with the number of tasks at a time: cuda:8,cpu:7.",
    "minutes": "Stop after this many minutes; 0 writes tables and picture from existing results.",
    "seeds": "Runs of each method, and ensembles of three; below three, no ensembles.",
    "small": "Rehearse all of it with a few samples.",
    "eager": "Do not replay VOGN's steps as CUDA graphs.",
}


def contest(
    *,
    out: Path,
    data_dir: Path | None = None,
    datasets: Sequence[str] = tuple(BUDGETS),
    devices: str = "cpu:1",
    minutes: float = math.inf,
    seeds: int = SEEDS,
    small: bool = False,
    eager: bool = False,
) -> str:
    """Start or continue the contest in the folder `out`, write its results, and return its tables.

    Args:
        out: The folder of the results; what is there already is not done again.
        data_dir: The folder of the data sets.
        datasets: Which of `BUDGETS`.
        devices: Where, and how many at a time on each, such as "cuda:8,cpu:7".
        minutes: When to stop; 0 writes tables and picture from what is there.
        seeds: How many runs each method has, see `plan`.
        small: Whether to rehearse all of it with a few samples.
        eager: Whether no steps of VOGN are replayed as CUDA graphs on a GPU.

    Raises:
        OptionError: An option is not allowed.
        DataError: The data are missing, or the folder has another contest.
    """
    budgets = SMALL if small else BUDGETS
    if unknown := [name for name in datasets if name not in budgets]:
        raise OptionError(f"the contest has no data set {unknown[0]!r}; choose among {', '.join(budgets)}")
    folder = at_home(out)
    place_of = partial(
        Place,
        data_dir=data_dir and at_home(data_dir),
        folder=folder,
        budgets=budgets,
        end=time.time() + 60 * minutes,
        eager=eager,
    )
    with held(folder):
        places = {place_of(device=device): jobs for device, jobs in _parsed(devices).items()}
        standings = _opened(folder, budgets, places)
        prepare()
        _time_steps(standings, datasets, next(iter(places)))
        _perform(standings, datasets, places, seeds)
        return _written(standings, datasets)


@dataclass
class _Standings:
    """What is known so far, and where it is written.

    Attributes:
        folder: that of the results.
        about: the budgets, and the machine of the last task.
        costs: of a step, by data set and method.
        results: of each task.
    """

    folder: Path
    about: dict[str, Any]
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    results: dict[Task, Result] = field(default_factory=dict)

    def save(self) -> None:
        write_json(self.folder / "results.json", self.about, self.costs, self.results)


def _opened(folder: Path, budgets: Mapping[str, Budget], places: Iterable[Place]) -> _Standings:
    """Return what the folder holds, or empty standings.

    Raises:
        DataError: The folder has a contest with other budgets.
    """
    about = {"budgets": {name: asdict(budget) for name, budget in budgets.items()}, "machine": _machine(places)}
    file = folder / "results.json"
    if not file.exists():
        return _Standings(folder, about)
    standings = _Standings(folder, *read_json(file))
    if standings.about["budgets"] != about["budgets"]:
        raise DataError(f"{folder} has a contest with other settings: choose another folder (--out)")
    return standings


def _time_steps(standings: _Standings, datasets: Sequence[str], place: Place) -> None:
    """Measure what a step of each method costs, where that is not known."""
    for dataset in datasets:
        if dataset not in standings.costs and time.time() < place.end:
            costs = step_costs(course_of(Task(dataset, "Adam", (), 0, False), place))
            standings.costs[dataset] = costs
            print(f"a step on {dataset}: {_rounded(costs)}", flush=True)


def _perform(standings: _Standings, datasets: Sequence[str], places: Mapping[Place, int], seeds: int) -> None:
    """Perform what is left, and save each result."""
    first = next(iter(places))

    def tasks(place: Place, done: Results) -> Iterator[Task]:
        # Devices that differ begin with different data sets: a GPU gains more from the first, larger network.
        return plan(datasets if place is first else datasets[::-1], done, seeds)

    for task in performed(tasks, standings.results, places):
        standings.about["machine"] = _machine(places)
        standings.save()
        result = standings.results[task]
        print(f"{task.name()}: {result.problem or _rounded(result.scores)} ({result.seconds} s)", flush=True)


def _written(standings: _Standings, datasets: Sequence[str]) -> str:
    """Write all files, and return the tables."""
    folder, costs, results = standings.folder, standings.costs, standings.results
    parts = [
        f"## {DATASET_TITLES[name]}\n\n{table(name, results, costs)}\n\n{settings_table(name, results)}"
        for name in datasets
    ]
    text = "\n\n".join([*parts, f"{standings.about['machine']}."])
    standings.save()
    write_csv(folder / "results.csv", results)
    with writing(folder / "contest.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    draw(folder / "contest.png", datasets, results)
    return text


def _parsed(devices: str) -> dict[str, int]:
    """Return how many tasks at a time there are on each device.

    Raises:
        OptionError: It is not a list such as "cuda:8,cpu:7".
    """
    try:
        jobs = {name: int(number) for name, number in (part.rsplit(":", 1) for part in devices.split(","))}
        if all(torch.device(name) and number > 0 for name, number in jobs.items()):
            return jobs
    except (ValueError, RuntimeError):
        pass
    raise OptionError(f"devices={devices!r} must name devices with numbers of tasks at a time, such as cuda:8,cpu:7")


def _machine(places: Iterable[Place]) -> str:
    """The versions, and the names of the devices."""
    return f"torch {torch.__version__}, Python {platform.python_version()}, {', '.join(map(_hardware, places))}"


def _hardware(place: Place) -> str:
    """The name of the device."""
    on_gpu = torch.device(place.device).type == "cuda"
    return torch.cuda.get_device_name(place.device) if on_gpu else platform.processor() or platform.machine()


def _rounded(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with options from the command line."""
    parser = argparse.ArgumentParser(prog="python -m persample.experiments.contest", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs") / "contest", help=HELP["out"])
    parser.add_argument("--data-dir", type=Path, help=HELP["data_dir"])
    parser.add_argument("--dataset", action="append", choices=list(BUDGETS), dest="datasets", help=HELP["datasets"])
    parser.add_argument("--devices", default="cpu:1", help=HELP["devices"])
    parser.add_argument("--minutes", type=float, default=math.inf, help=HELP["minutes"])
    parser.add_argument("--seeds", type=int, default=SEEDS, help=HELP["seeds"])
    parser.add_argument("--small", action="store_true", help=HELP["small"])
    parser.add_argument("--eager", action="store_true", help=HELP["eager"])
    options = vars(parser.parse_args(arguments))
    print(contest(**options | {"datasets": options["datasets"] or tuple(BUDGETS)}))
