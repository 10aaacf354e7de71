"""Where the time of `backend="fused"` goes, operation by operation, beside an ordinary forward and backward pass.

    python benchmarks/profile_gradients.py --model ResNet-20

Both take turns under `torch.profiler`. Prints the operations whose own time differs most.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

import persample
from persample.checks.benchmark import plain_pass

sys.path.insert(0, str(Path(__file__).parent))
from gradients import OWN_BATCH, problem

CALLS = ("plain", "fused")


def main(
    model: Annotated[str, typer.Option(help="Name of the model.")] = "LeNet-5",
    batch: Annotated[int, typer.Option(help="Samples in a batch; 0 is the model's own.")] = 0,
    rounds: Annotated[int, typer.Option(help="How often both are run.")] = 20,
    rows: Annotated[int, typer.Option(help="How many operations to print.")] = 16,
) -> None:
    """Print the milliseconds of each operation in one call of both."""
    network, inputs, targets = problem(model, batch or OWN_BATCH.get(model, 128))
    source = persample.make_source("fused", network, persample.losses.cross_entropy, check="never")
    plain = plain_pass(network, persample.losses.cross_entropy, inputs, targets)
    calls = {"plain": plain, "fused": lambda: source.moments(inputs, targets)}
    for _ in range(4):
        for call in calls.values():
            call()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(rounds):
            for name, call in calls.items():
                with record_function(name):
                    call()
    events = recorded.events()
    marks = sorted((e.time_range.start, e.time_range.end, e.name) for e in events if e.name in calls)
    starts = [start for start, _, _ in marks]
    own: dict[str, Counter[str]] = {name: Counter() for name in calls}
    count: dict[str, Counter[str]] = {name: Counter() for name in calls}
    for event in events:
        place = bisect_right(starts, event.time_range.start) - 1
        if event.name not in calls and place >= 0:
            name = marks[place][2]
            own[name][event.name] += event.self_cpu_time_total / rounds / 1000
            count[name][event.name] += 1
    total = {name: fmean(end - start for start, end, mark in marks if mark == name) / 1000 for name in calls}
    table = Table("operation", *(f"{name}: times, ms" for name in calls), "difference, ms", title=model)
    difference = {op: own["fused"][op] - own["plain"][op] for op in own["plain"] | own["fused"]}
    for op in sorted(difference, key=lambda op: -abs(difference[op]))[:rows]:
        cells = [f"{count[name][op] // rounds} ×, {own[name][op]:.2f}" for name in CALLS]
        table.add_row(op, *cells, f"{difference[op]:+.2f}")
    outside = {name: total[name] - sum(own[name].values()) for name in CALLS}
    table.add_row("outside of operations", *(f"{outside[name]:.2f}" for name in CALLS), "")
    table.add_row("a whole call", *(f"{total[name]:.2f}" for name in CALLS), f"{total['fused'] - total['plain']:+.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
