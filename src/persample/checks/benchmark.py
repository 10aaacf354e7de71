"""`benchmark`: the cost of each backend, relative to an ordinary forward and backward pass in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from persample.checks.crosscheck import Agreement, as_it_was, crosscheck
from persample.checks.memory import peak_memory
from persample.losses import as_per_sample
from persample.quantities import Quantity
from persample.sources.batch import as_batch
from persample.sources.model.random_state import random_state, random_state_restored
from persample.sources.registry import make_source, name_with, names_side_by_side
from persample.sources.source import PerSampleGradSource

#: The name under which the ordinary forward and backward pass stands in the results.
PLAIN = "plain"


@dataclass(frozen=True)
class Cost:
    """Time and memory of `moments`, or of the quantities that were asked for, with one backend.

    Attributes:
        backend: its name, or `"plain"` for the ordinary forward and backward pass.
        seconds: median time of one call.
        time_ratio: median over the rounds of the time over that of the plain pass of the same round.
        time_ratio_low: first quartile of that ratio.
        time_ratio_high: third quartile.
        peak_bytes: the most that tensors occupied during one call, parameters and batch included.
        memory_ratio: `peak_bytes` over that of the plain pass.
        problem: why it was not timed (it refused, or it disagrees with the oracle), or None.
        machinery: which of its machineries ran, for a backend that has several.
    """

    backend: str
    seconds: float | None = None
    time_ratio: float | None = None
    time_ratio_low: float | None = None
    time_ratio_high: float | None = None
    peak_bytes: int | None = None
    memory_ratio: float | None = None
    problem: str | None = None
    machinery: str | None = None

    @property
    def name(self) -> str:
        """The backend's name, with the machinery that ran: `"opacus (rules)"`."""
        return name_with(self.backend, self.machinery)


# How backends run once they have settled, where that takes more calls than are timed.
_SETTLED: Mapping[str, Mapping[str, Any]] = {"fused": {"compile": True}}


def benchmark(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Any],
    inputs: Any,
    targets: Any,
    *,
    backends: Iterable[str] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    rounds: int = 15,
    quantities: Sequence[Quantity[Any]] = (),
) -> list[Cost]:
    """Time `moments`, or `quantities`, with each backend against an ordinary forward and backward pass.

    In every round the plain pass and all backends take their turn, so that what else the machine does meets them
    alike; the ratios are medians over the rounds. Each turn is two calls, of which the second is timed, as in a loop
    that does nothing else: the first finds the caches and the memory that another backend left. A backend that refuses
    or disagrees with the oracle (see `crosscheck`) is not timed. Self-checks are off while the clock runs. `fused`
    records its step after ten calls or more, and is timed as it runs from then on; with
    `options={"fused": {"compile": False}}` as it runs before.

    Args:
        model: the network; it is not changed.
        loss_fn: the loss of each sample, or a loss module of `torch.nn`.
        inputs: a mini-batch, as for `PerSampleGradSource.moments`.
        targets: its targets.
        backends: names to time. All that exist but the slow `loop` if None, those of several machineries with each of
            them, as `"opacus (module)"` and `"opacus (rules)"`.
        options: options for single backends, by name.
        rounds: how often each is timed.
        quantities: what `source.compute` is asked for, all at once, in place of `moments`.

    Returns:
        The plain pass first, then the backends in the order given.
    """
    options = options or {}
    names = [name for name in names_side_by_side(options) if name != "loop"] if backends is None else backends
    agreements = crosscheck(model, loss_fn, inputs, targets, backends=names, options=options, quantities=quantities)
    calls: dict[str, Callable[[], Any]] = {PLAIN: plain_pass(model, loss_fn, inputs, targets)}
    for agreement in agreements:
        if agreement.agrees:
            own = {**_SETTLED.get(agreement.backend, {}), **options.get(agreement.backend, {})}
            source = make_source(agreement.backend, model, loss_fn, check="never", **own)
            calls[agreement.backend] = partial(_call, source, inputs, targets, quantities)
    resident = _bytes((list(model.parameters()), list(model.buffers()), inputs, targets))
    with as_it_was(model), random_state_restored(model, random_state(model)):
        seconds = alternate(calls, rounds, _device(model))
        peaks = {name: resident + peak_memory(call, _device(model)) for name, call in calls.items()}

    costs = [_cost(PLAIN, seconds, peaks)]
    for agreement in agreements:
        if agreement.agrees:
            costs.append(replace(_cost(agreement.backend, seconds, peaks), machinery=agreement.machinery))
        else:
            costs.append(Cost(agreement.backend, problem=agreement.problem or _disagreement(agreement)))
    return costs


def _call(source: PerSampleGradSource, inputs: Any, targets: Any, quantities: Sequence[Quantity[Any]]) -> Any:
    return source.compute(inputs, targets, *quantities) if quantities else source.moments(inputs, targets)


def plain_pass(
    model: nn.Module, loss_fn: Callable[[Any, Any], Any], inputs: Any, targets: Any
) -> Callable[[], tuple[Tensor, ...]]:
    """Return a function that runs the ordinary forward and backward pass of the mean loss."""
    batch = as_batch(inputs, targets, model)
    per_sample_loss = as_per_sample(loss_fn)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def plain_pass() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            args, kwargs, targets = batch.for_a_call()
            loss = per_sample_loss(model(*args, **kwargs), targets).mean()
            return torch.autograd.grad(loss, parameters, allow_unused=True)

    return plain_pass


def alternate(calls: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call in each round; the first round is a warm-up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(rounds + 1):
        for name, call in calls.items():
            call()
            wait_for(device)
            start = time.perf_counter()
            call()
            wait_for(device)
            if round_number > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _cost(name: str, seconds: Mapping[str, list[float]], peaks: Mapping[str, int]) -> Cost:
    ratios = [own / plain for own, plain in zip(seconds[name], seconds[PLAIN], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return Cost(
        backend=name,
        seconds=statistics.median(seconds[name]),
        time_ratio=middle,
        time_ratio_low=low,
        time_ratio_high=high,
        peak_bytes=peaks[name],
        memory_ratio=peaks[name] / peaks[PLAIN],
    )


def _disagreement(agreement: Agreement) -> str:
    of_quantities = "" if agreement.quantities is None else f", quantities {agreement.quantities:.1e}"
    return (
        f"not timed: it disagrees with the oracle (relative errors: mean {agreement.mean:.1e}, second moment "
        f"{agreement.second_moment:.1e}, per-sample {agreement.per_sample:.1e}{of_quantities}; allowed "
        f"{agreement.allowed:.0e})"
    )


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def wait_for(device: torch.device) -> None:
    """Wait for what a GPU is still computing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))
