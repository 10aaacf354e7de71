"""The tasks of a contest and their order: trials on held-out data, then runs with the best settings."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from persample.experiments.contest.methods import METHODS
from persample.experiments.contest.settings import TRIALS

SettingsItems: TypeAlias = tuple[tuple[str, Any], ...]

#: How many runs every method has, with the seeds 0, 1, …; the members of further ensembles have the seeds that follow.
SEEDS = 3


@dataclass(frozen=True)
class Task:
    """A trial or a run of one method.

    Attributes:
        dataset: The data set.
        method: One of `METHODS`.
        settings: Those that are tried or used, in pairs; of what is made of another method, also that one's.
        seed: Its seed; of an ensemble, the number of the ensemble.
        trial: Whether it is measured on training samples that are held out, to choose settings by; otherwise on the
            test data, after training on all.
    """

    dataset: str
    method: str
    settings: SettingsItems
    seed: int
    trial: bool

    def needs(self) -> list[Task]:
        """Return the tasks whose results this one begins with."""
        method = METHODS[self.method]
        if method.of is None:
            return []
        own = TRIALS[self.dataset].get(self.method, [{}])[0]
        settings = tuple(pair for pair in self.settings if pair[0] not in own)
        seeds = range(method.runs * self.seed, method.runs * (self.seed + 1))
        return [Task(self.dataset, method.of, settings, seed, self.trial) for seed in seeds]

    def name(self) -> str:
        """Return a name for files."""
        settings = "_".join(f"{name}={value}" for name, value in self.settings)
        return f"{self.dataset}_{self.method}_{'trial' if self.trial else 'run'}{self.seed}_{settings}".replace(
            " ", "-"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the task as JSON knows it."""
        return asdict(self) | {"settings": dict(self.settings)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Task:
        """Return the task that `as_dict` wrote."""
        return Task(**{**values, "settings": tuple(values["settings"].items())})


@dataclass(frozen=True)
class Result:
    """The result of a task.

    Attributes:
        scores: The metrics by name; empty if there is a problem.
        seconds: How long it took, beside the others that ran at the same time.
        device: Where.
        problem: Why there are no scores: the training diverged, for example.
    """

    scores: dict[str, float]
    seconds: float
    device: str
    problem: str | None = None


Results: TypeAlias = Mapping[Task, Result]


def plan(datasets: Collection[str], results: Results, seeds: int = SEEDS) -> Iterator[Task]:
    """Yield all tasks whose settings are known by now, the most important first.

    Runs of a method are planned as soon as all its trials are done.

    Args:
        datasets: The data sets.
        results: What is done.
        seeds: How many runs each method has, and how many ensembles of three there are; with less than three, none.
    """
    for dataset in datasets:
        for method in TRIALS[dataset]:
            yield from trials(dataset, method, results)
        yield from _runs(dataset, results, range(1), 0)
    for dataset in datasets:
        yield from _runs(dataset, results, range(seeds), min(1, seeds // 3))
    for dataset in datasets:
        yield from _runs(dataset, results, range(seeds), seeds if seeds >= 3 else 0)


def trials(dataset: str, method: str, results: Results) -> list[Task]:
    """Return the trials of a method; of what is made of another one, none until that one's settings are chosen."""
    of = METHODS[method].of
    base = () if of is None else chosen(dataset, of, results)
    tried = TRIALS[dataset].get(method, ())
    return [] if base is None else [Task(dataset, method, (*base, *own.items()), 0, True) for own in tried]


def chosen(dataset: str, method: str, results: Results) -> SettingsItems | None:
    """Return the settings with the lowest log loss on held-out data; None if trials are missing, or all failed.

    An ensemble has the settings of its members.
    """
    if method not in TRIALS[dataset]:
        of = METHODS[method].of
        return None if of is None else chosen(dataset, of, results)
    tried = trials(dataset, method, results)
    if not tried or any(task not in results for task in tried):
        return None
    losses = {task.settings: results[task].scores["log_loss"] for task in tried if results[task].scores}
    return min(losses, key=losses.__getitem__) if losses else None


def _runs(dataset: str, results: Results, seeds: range, ensembles: int) -> Iterator[Task]:
    """Yield a run of each method for each seed, and the ensembles after what they need."""
    for name, method in METHODS.items():
        settings = chosen(dataset, name, results)
        if settings is None:
            continue
        for seed in seeds if method.runs == 1 else range(ensembles):
            task = Task(dataset, name, settings, seed, False)
            yield from task.needs()
            yield task
