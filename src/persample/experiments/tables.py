"""The tables that the command line prints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean, stdev

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from persample.checks import Agreement, Cost
from persample.experiments.australian_credit.scores import Score
from persample.experiments.australian_credit.settings import PUBLISHED
from persample.experiments.records import Prediction, Record
from persample.sources import Backend

_PREDICTIONS: dict[Prediction, str] = {
    "point": "Adam",
    "mean": "VOGN, posterior mean",
    "averaged": "VOGN, averaged",
}


def _metrics_table(title: str, accuracy: str) -> Table:
    table = Table(title=title)
    for heading in ("predictions", "data"):
        table.add_column(heading)
    for heading in (accuracy, "log loss", "calibration error"):
        table.add_column(heading, justify="right")
    return table


def results_table(records: Sequence[Record]) -> Table:
    """Return the metrics after the last epoch, for each way to predict."""
    table = _metrics_table(f"After epoch {max(record.epoch for record in records)}", accuracy="accuracy")
    for prediction, name in _PREDICTIONS.items():
        for record in _last_epoch([record for record in records if record.prediction == prediction]):
            metrics = record.metrics
            table.add_row(
                name,
                record.split,
                f"{metrics.accuracy:.2%}",
                f"{metrics.log_loss:.4f}",
                f"{metrics.calibration_error:.4f}",
                end_section=record.split != "train",
            )
    return table


def summary_table(runs: Sequence[Sequence[Record]]) -> Table:
    """Return mean and standard deviation of the metrics over runs, each a list of records in the same order."""
    title = f"After epoch {runs[0][0].epoch}: mean ± standard deviation over {len(runs)} seeds"
    table = _metrics_table(title, accuracy="accuracy in %")
    for prediction, name in _PREDICTIONS.items():
        for same in zip(*runs, strict=True):
            if same[0].prediction != prediction:
                continue
            metrics = [record.metrics for record in same]
            table.add_row(
                name,
                same[0].split,
                _spread([100 * m.accuracy for m in metrics], 2),
                _spread([m.log_loss for m in metrics], 4),
                _spread([m.calibration_error for m in metrics], 4),
                end_section=same[0].split != "train",
            )
    return table


def agreement_table(agreements: Iterable[Agreement], title: str) -> Group:
    """The table of errors of each backend, and below it why some have none."""
    agreements = list(agreements)
    asked = ["quantities"] if any(agreement.quantities is not None for agreement in agreements) else []
    table = Table(title=title, caption="Largest relative errors against a loop over the samples in float64")
    for heading in ("backend", "mean", "second moment", "per-sample", *asked, "allowed", "verdict"):
        table.add_column(heading, justify="left" if heading in ("backend", "verdict") else "right")
    for agreement in agreements:
        of_quantities = [agreement.quantities] if asked else []
        errors = (agreement.mean, agreement.second_moment, agreement.per_sample, *of_quantities, agreement.allowed)
        verdict = "agrees" if agreement.agrees else "no result" if agreement.problem else "DISAGREES"
        table.add_row(agreement.name, *(_number(error, ".1e") for error in errors), verdict)
    return _with_problems(table, agreements)


def cost_table(costs: Iterable[Cost], title: str, timed: Sequence[str] = ()) -> Group:
    """Return what each backend costs for what was `timed`, the moments if that is empty; below it what was not."""
    costs = list(costs)
    what = ", ".join(timed) or "moments"
    table = Table(title=title, caption=f"Ratios of {what} to a plain forward and backward pass of the same run")
    for heading in ("backend", "ms", "time ×", "quartiles", "peak MiB", "memory ×"):
        table.add_column(heading, justify="left" if heading == "backend" else "right")
    for cost in costs:
        quartiles = [_number(ratio, ".2f") for ratio in (cost.time_ratio_low, cost.time_ratio_high)]
        table.add_row(
            cost.name,
            _number(cost.seconds, ".2f", 1e3),
            _number(cost.time_ratio, ".2f"),
            "–" if cost.problem else " to ".join(quartiles),
            _number(cost.peak_bytes, ".1f", 2**-20),
            _number(cost.memory_ratio, ".2f"),
        )
    return _with_problems(table, costs)


def _with_problems(table: Table, rows: Sequence[Agreement | Cost]) -> Group:
    """Return a table, and below it each problem in full, with the backends that have it."""
    backends: dict[str, list[str]] = {}
    for row in rows:
        if row.problem:
            backends.setdefault(row.problem, []).append(row.name)
    return Group(table, *(Text(f"{', '.join(names)}: {problem}") for problem, names in backends.items()))


def backends_table(backends: Iterable[Backend]) -> Table:
    """The table of backends, and whether they can be used here."""
    table = Table(title="Backends")
    for heading in ("name", "machineries", "usable here", "why not"):
        table.add_column(heading)
    for backend in backends:
        missing = "; ".join(filter(None, (backend.problem, backend.install if backend.problem else "")))
        if backend.kernels:
            table.caption = f"{backend.name} and the optimizers compute with {escape(backend.kernels)}."
        table.add_row(
            backend.name, ", ".join(backend.machineries), "yes" if backend.available else "no", escape(missing)
        )
    return table


def australian_table(scores: Sequence[Score]) -> Table:
    """Return the scores of each method and setting over seeds and measurements, beside the published ones."""
    seeds = len({score.run.seed for score in scores})
    table = Table(
        title="Australian credit, in nats per sample (lower is better)",
        caption=(
            f"Mean ± standard deviation of a measurement as published (10 draws), over {seeds} seeds and "
            f"{len(scores[0].negative_elbos)} measurements of each;\n≤: the share that is at most the published one. "
            "Averaged log loss: mean ± standard deviation over the seeds."
        ),
    )
    for heading in ("method", "batch", "draws"):
        table.add_column(heading)
    for heading in ("−ELBO", "published", "≤", "test log loss", "published", "≤", "averaged log loss"):
        table.add_column(heading, justify="right")
    for setting in dict.fromkeys(score.run.setting for score in scores):
        own = [score for score in scores if score.run.setting == setting]
        published = PUBLISHED[setting]
        table.add_row(
            setting.method,
            str(setting.batch_size),
            str(setting.draws),
            *_beside([v for score in own for v in score.negative_elbos], published.negative_elbo),
            *_beside([v for score in own for v in score.test_log_losses], published.test_log_loss),
            _spread([score.averaged_log_loss for score in own]),
        )
    return table


def _beside(measured: Sequence[float], published: float) -> tuple[str, str, str]:
    """Mean ± standard deviation, the published value, and the share of what was measured that is at most that."""
    return _spread(measured), f"{published:.3f}", f"{mean(value <= published for value in measured):.0%}"


def _spread(values: Sequence[float], digits: int = 3) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def _last_epoch(records: list[Record]) -> list[Record]:
    return [record for record in records if record.epoch == records[-1].epoch]


def _number(value: float | None, form: str, factor: float = 1) -> str:
    return "–" if value is None else format(value * factor, form)
