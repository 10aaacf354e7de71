"""What the products of single samples cost, layer by layer: the part of `fused` that no arrangement can leave out.

    python benchmarks/layers.py --model LeNet-5

For every convolution and linear layer, the ordinary weight gradient and the sums Σ g_i and Σ g_i² as `fused` takes
them are timed in turns on the layer's own inputs and output gradients. An ordinary forward and backward pass, with the
one in place of the other, is what `fused` would take if everything else in it were free.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import persample
from persample.checks.benchmark import plain_pass
from persample.moments import Moments
from persample.sources.backends.contributions import Contribution
from persample.sources.backends.fused.accumulators import Moment
from persample.sources.backends.fused.convolution import Convolution
from persample.sources.backends.fused.expressions import Expression
from persample.sources.backends.fused.linear import LinearProducts
from persample.sources.backends.fused.source import FusedSource
from persample.sources.batch import Batch

sys.path.insert(0, str(Path(__file__).parent))
from gradients import OWN_BATCH, problem


class Keeping(FusedSource):
    """Keeps what the layers contribute."""

    def compute_moments(self, batch: Batch) -> Moments:
        self.kept: list[tuple[str, Contribution]] = []
        kept = self.kept

        class Kept(Moment):
            def receive(self, expression: Expression, contribution: Contribution) -> None:
                kept.append((next(iter(expression.parameters)), contribution))

        losses = self._backward(batch, self.parameters(), Kept(batch.size))
        nothing = {name: torch.zeros_like(p) for name, p in self.parameters().items()}
        return Moments(losses, nothing, nothing)


def ordinary(contribution: Any) -> Callable[[], Tensor] | None:
    """Return a function that computes the ordinary gradient of a layer's weight; None if it is no product."""
    if isinstance(contribution, LinearProducts):
        delta, a = contribution.delta.flatten(0, 1), contribution.a.flatten(0, 1)
        return lambda: delta.mT @ a
    if isinstance(contribution, Convolution):
        c, geometry = contribution, contribution.geometry
        weight = c.x.new_empty(geometry.weight)
        sizes = geometry.stride, geometry.padding, geometry.dilation, False, [0] * len(geometry.stride)
        return lambda: torch.ops.aten.convolution_backward(
            c.delta, c.x, weight, None, *sizes, geometry.groups, [False, True, False]
        )[1]
    return None


def milliseconds(call: Callable[[], Any]) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def main(
    model: Annotated[str, typer.Option(help="Name of the model.")] = "LeNet-5",
    batch: Annotated[int, typer.Option(help="Samples in a batch; 0 is the model's own.")] = 0,
    rounds: Annotated[int, typer.Option(help="How often each is timed.")] = 20,
) -> None:
    """Print the milliseconds of each layer's weight gradient, ordinary and sample by sample."""
    network, inputs, targets = problem(model, batch or OWN_BATCH.get(model, 128))
    plain = plain_pass(network, persample.losses.cross_entropy, inputs, targets)
    source = Keeping(network, persample.losses.cross_entropy, check="never")
    source.moments(inputs, targets)
    kept: list[tuple[str, Any]] = source.kept
    calls = {"a whole pass": (plain, plain)}
    calls |= {name: (call, c.sums) for name, c in reversed(kept) if (call := ordinary(c)) is not None}
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in calls}
    for number in range(rounds + 3):
        for name, pair in calls.items():
            took = tuple(milliseconds(call) for call in pair)
            if number >= 3:  # the first rounds choose forms and warm up
                times[name].append(took)
    middle = {name: [median(side) for side in zip(*took, strict=True)] for name, took in times.items()}
    table = Table("weight", "ordinary, ms", "single samples, ms", "difference, ms", title=model)
    whole = middle.pop("a whole pass")[0]
    for name, (before, after) in middle.items():
        table.add_row(name, f"{before:.2f}", f"{after:.2f}", f"{after - before:+.2f}")
    more = sum(after - before for before, after in middle.values())
    table.add_row("a whole ordinary pass", f"{whole:.2f}", f"{whole + more:.2f}", f"{more:+.2f}")
    Console(width=120).print(table)
    print(f"Time over an ordinary pass, if everything but these products were free: {1 + more / whole:.2f}")


if __name__ == "__main__":
    typer.run(main)
