"""The results of the contest: as a file, as a table, and as a picture."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from persample.errors import DataError
from persample.experiments.contest.methods import METHODS
from persample.experiments.contest.tasks import Result, Results, Task, chosen
from persample.experiments.data.load import DATASET_TITLES
from persample.experiments.extras import require
from persample.experiments.run_folder import writing

#: The metrics with their headings, and whether lower is better.
METRICS: Mapping[str, tuple[str, bool]] = {
    "log_loss": ("log loss", True),
    "accuracy": ("accuracy", False),
    "calibration_error": ("calibration error", True),
    "brier": ("Brier score", True),
    "auroc": ("AUROC", False),
}

Costs = Mapping[str, Mapping[str, float]]


def write_json(path: Path, contest: Mapping[str, Any], costs: Costs, results: Results) -> None:
    """Write the contest's settings and results, whole or not at all."""
    rows = [task.as_dict() | asdict(result) for task, result in results.items()]
    with writing(path) as temporary:
        temporary.write_text(json.dumps({"contest": contest, "costs": costs, "results": rows}, indent=1) + "\n")


def read_json(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, float]], dict[Task, Result]]:
    """Return what `write_json` wrote.

    Raises:
        DataError: The file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        results = {}
        for row in content["results"]:
            result = Result(**{name: row.pop(name) for name in Result.__dataclass_fields__})
            results[Task.from_dict(row)] = result
        return content["contest"], content["costs"], results
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not a file of a contest, or is damaged ({error!r}): choose another folder (--out)"
        ) from error


def write_csv(path: Path, results: Results) -> None:
    """Write one row for each trial and run, whole or not at all."""
    columns = ["dataset", "method", "trial", "seed", "settings", *METRICS, "seconds", "device", "problem"]
    with writing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for task, result in results.items():
            values = {**task.as_dict(), **asdict(result), **result.scores}
            values["settings"] = " ".join(f"{name}={value}" for name, value in task.settings)
            writer.writerow({column: values.get(column, "") for column in columns})


def runs_of(dataset: str, results: Results) -> dict[str, list[dict[str, float]]]:
    """Return the scores of the runs of each method with the chosen settings, the lowest mean log loss first.

    Of methods that ensembles are made of, the runs for the members of further ensembles count, too.
    """
    found: dict[str, list[dict[str, float]]] = {}
    for method in METHODS:
        settings = chosen(dataset, method, results)
        own = [
            result.scores
            for task, result in results.items()
            if (task.dataset, task.method, task.settings, task.trial) == (dataset, method, settings, False)
            and result.scores
        ]
        if own:
            found[method] = own
    return dict(sorted(found.items(), key=lambda item: mean(run["log_loss"] for run in item[1])))


def table(dataset: str, results: Results, costs: Costs) -> str:
    """Return the results on the test data as a table in Markdown; of single networks, the best value is bold."""
    runs = runs_of(dataset, results)
    single = [name for name in runs if METHODS[name].runs == 1]
    best = {
        metric: (min if lower else max)(single, key=lambda name: mean(run[metric] for run in runs[name]), default=None)
        for metric, (_, lower) in METRICS.items()
    }
    headings = ["method", *(heading for heading, _ in METRICS.values()), "runs", "training, Adam = 1", "networks"]
    lines = [headings, ["---"] * len(headings)]
    for name, own in runs.items():
        cells = []
        for metric in METRICS:
            cell = spread([run[metric] for run in own], metric)
            cells.append(f"**{cell}**" if name == best[metric] else cell)
        cost = cost_of(name, costs.get(dataset, {}))
        networks = METHODS[name].runs * METHODS[name].draws
        lines.append([name, *cells, str(len(own)), "" if cost is None else f"{cost:.2g}", str(networks)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def settings_table(dataset: str, results: Results) -> str:
    """Return the chosen settings of each method, and its log loss on held-out data, as a table in Markdown."""
    lines = ["| method | chosen settings | log loss on held-out data, best and worst trial |", "|---|---|---|"]
    for method in METHODS:
        settings = chosen(dataset, method, results)
        tried = [
            result.scores.get("log_loss", float("nan"))
            for task, result in results.items()
            if (task.dataset, task.method, task.trial) == (dataset, method, True)
        ]
        if settings is not None and tried:
            text = ", ".join(
                f"{name} {value:g}" if isinstance(value, float) else f"{value}" for name, value in settings
            )
            lines.append(f"| {method} | {text} | {min(tried):.4f}, {max(tried):.4f} |")
    return "\n".join(lines)


def cost_of(method: str, costs: Mapping[str, float]) -> float | None:
    """Return what the training costs in trainings by Adam: of what is made of other runs, the sum of theirs."""
    of = METHODS[method].of
    if of is None:
        return costs.get(method)
    cost = cost_of(of, costs)
    return None if cost is None else METHODS[method].runs * cost


def spread(values: Iterable[float], metric: str) -> str:
    """Mean ± standard deviation, of accuracies in percent."""
    values = [100 * value if metric == "accuracy" else value for value in values]
    digits = 2 if metric == "accuracy" else 4
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}{' %' if metric == 'accuracy' else ''}"


def draw(path: Path, datasets: Iterable[str], results: Results) -> None:
    """Draw a row for each data set, and a column for each metric: each run as a dot, and the mean of each method.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    shown = {dataset: runs for dataset in datasets if (runs := runs_of(dataset, results))}
    if not shown:
        return
    columns = {name: METRICS[name] for name in ("log_loss", "accuracy", "calibration_error", "auroc")}
    size = (13, 0.6 + sum(0.9 + 0.28 * len(runs) for runs in shown.values()))
    figure = require("matplotlib.figure", "The picture").Figure(figsize=size, layout="constrained")
    ratios = [2 + len(runs) for runs in shown.values()]
    grid = figure.subplots(len(shown), len(columns), sharey="row", squeeze=False, height_ratios=ratios)
    for row, (dataset, runs) in zip(grid, shown.items(), strict=True):
        for axes, (metric, (heading, lower)) in zip(row, columns.items(), strict=True):
            for place, (method, own) in enumerate(runs.items()):
                values = [run[metric] for run in own]
                colour = _COLOURS.get(method, "#666666")
                axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.4, markersize=5)
                axes.plot(mean(values), place, "|", color=colour, markersize=15, markeredgewidth=2.5)
            axes.set_title(f"{heading} ({'lower' if lower else 'higher'} is better)", fontsize=10)
            axes.grid(alpha=0.3)
        row[0].set_yticks(range(len(runs)), runs)
        row[0].invert_yaxis()
        row[0].set_ylabel(DATASET_TITLES[dataset], fontsize="large")
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=150)


#: Of Okabe and Ito: VOGN in blue, Adam in orange, the others in grey.
_COLOURS = {"VOGN": "#0072B2", "3 × VOGN": "#0072B2", "Adam": "#D55E00", "3 × Adam": "#D55E00"}
