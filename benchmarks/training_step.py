"""Time of one training step: VOGN (draw, observe, update) against Adam and IVON.

    pip install ".[benchmarks]"
    python benchmarks/training_step.py --out runs/training-step

The optimizers take turns in a process of their own for each model: two steps each, of which the second is timed, as in
a loop that does nothing else. Ratios are to the Adam step of the same round, the fastest that PyTorch has. "build
before" is VOGN as it was before its steps were recorded, taken from git; without git it is left out. Writes
`training_step.json`, `training_step.md` and `training_step.png`; what the folder holds of other models stays.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from operator import truediv
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from matplotlib.figure import Figure
from torch import Tensor, nn

import persample
from persample.files import replacing

sys.path.insert(0, str(Path(__file__).parent))
from earlier import EARLIER, in_turns, timed, with_earlier
from gradients import in_fresh_process, machine, problem

DATA_SIZE = 50_000
WARM_UP = 10  # rounds, in which kinds of batches are checked, forms chosen and steps recorded


def adam_step(model: nn.Module, inputs: Tensor, targets: Tensor) -> Callable[[], None]:
    """Return a step of Adam, by the fastest of PyTorch's implementations."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def ivon_step(model: nn.Module, inputs: Tensor, targets: Tensor) -> Callable[[], None]:
    """Return a step of IVON with one draw."""
    import ivon

    optimizer = ivon.IVON(model.parameters(), lr=0.01, ess=DATA_SIZE)

    def step() -> None:
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def vogn_step(model: nn.Module, inputs: Tensor, targets: Tensor, **options: Any) -> Callable[[], None]:
    """Return a step of VOGN with one draw."""
    loss_fn = persample.losses.cross_entropy
    optimizer = persample.VOGN(
        model, loss_fn, data_size=DATA_SIZE, lr=1e-4, hess_init=0.1, momentum=0.9, backend_options=options
    )

    def step() -> None:
        optimizer.observe(inputs, targets)
        optimizer.step()

    return step


def own_ivon_step(model: nn.Module, inputs: Tensor, targets: Tensor) -> Callable[[], None]:
    """Return a step of this package's IVON with one draw."""
    optimizer = persample.IVON(model, persample.losses.cross_entropy, data_size=DATA_SIZE, lr=0.01)

    def step() -> None:
        optimizer.observe(inputs, targets)
        optimizer.step()

    return step


def compiled_adam_step(model: nn.Module, inputs: Tensor, targets: Tensor) -> Callable[[], None]:
    """Return a step of Adam on the model under `torch.compile`."""
    return adam_step(torch.compile(model), inputs, targets)  # type: ignore[arg-type]


def moments_alone(model: nn.Module, inputs: Tensor, targets: Tensor) -> Callable[[], Any]:
    """Return what VOGN's step must do at least: the moments of the gradients."""
    source = persample.make_source("fused", model, persample.losses.cross_entropy)
    return lambda: source.moments(inputs, targets)


def noise_alone(model: nn.Module, inputs: Tensor, targets: Tensor) -> Callable[[], Any]:
    """Return what else it must do at least: one random number for each weight."""
    size = sum(p.numel() for p in model.parameters())
    return lambda: torch.randn(size)


ADAM = "Adam"
VOGN = "VOGN"
STEPS: dict[str, Callable[..., Callable[[], Any]]] = {
    ADAM: adam_step,
    "Adam, compiled": compiled_adam_step,
    "IVON": ivon_step,
    "own IVON": own_ivon_step,
    VOGN: vogn_step,
    "VOGN, eager": partial(vogn_step, compile=False),
    "VOGN, replayed": partial(vogn_step, compile=True),
    "VOGN, inductor": partial(vogn_step, compile="inductor"),
    "moments alone": moments_alone,
    "noise alone": noise_alone,
}
COLUMNS = [*STEPS, EARLIER]


def measure(name: str, batch: int, rounds: int, steps: list[str]) -> dict[str, Any]:
    """Return the median time of each step, and the quartiles of its ratio to the Adam step."""
    given = problem(name, batch)
    model, inputs, targets = given
    calls = {step: timed(STEPS[step](copy.deepcopy(model), inputs, targets)) for step in steps if step in STEPS}
    with with_earlier(calls, "step", given) if EARLIER in steps else nullcontext(calls) as all_calls:
        seconds = in_turns(all_calls, rounds, WARM_UP)
    results = {}
    for step, took in seconds.items():
        ratios = [own / adam for own, adam in zip(took, seconds[ADAM], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        results[step] = {"seconds": statistics.median(took), "ratio": middle, "low": low, "high": high}
    gains = {}
    if EARLIER in seconds and VOGN in seconds:
        gains = {"gain": statistics.median(map(truediv, seconds[EARLIER], seconds[VOGN]))}
    return {"model": name, "batch": batch, "steps": results, **gains}


def table(results: list[dict[str, Any]]) -> str:
    """Return the ratios as a Markdown table."""
    others = [name for name in COLUMNS if name != ADAM and any(name in result["steps"] for result in results)]
    lines = [
        f"| model | batch | Adam | {' | '.join(others)} | build before over VOGN |",
        "|---" * (len(others) + 4) + "|",
    ]
    for result in results:
        steps = result["steps"]
        cells = [f"{steps[name]['ratio']:.2f}" if name in steps else "not run" for name in others]
        cells = [f"{1000 * steps[ADAM]['seconds']:.1f} ms", *cells]
        cells.append(f"{result['gain']:.2f}" if "gain" in result else "not run")
        lines.append(f"| {result['model']} | {result['batch']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def picture(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the ratios of all steps as points with their quartiles, a line for each model."""
    figure = Figure(figsize=(9, 1.4 + 0.8 * len(results)), layout="constrained")
    axes = figure.subplots()
    measured = {name for r in results for name in r["steps"]} - {ADAM, "noise alone"}
    shown = [name for name in COLUMNS if name in measured]
    for place, (name, marker) in enumerate(zip(shown, "|P*oXsDd^", strict=False)):
        rows = [
            (i + 0.6 * (place / len(shown) - 0.5), r["steps"][name])
            for i, r in enumerate(results)
            if name in r["steps"]
        ]
        middles = [step["ratio"] for _, step in rows]
        spread = [[s["ratio"] - s["low"] for _, s in rows], [s["high"] - s["ratio"] for _, s in rows]]
        axes.errorbar(middles, [y for y, _ in rows], xerr=spread, fmt=marker, markersize=8, elinewidth=1, label=name)
    axes.axvline(1, color="black", linewidth=1)
    axes.grid(axis="x", alpha=0.3)
    axes.set_yticks(range(len(results)), [f"{r['model']}, batch {r['batch']}" for r in results])
    axes.set_ylim(len(results) - 0.4, -0.6)
    axes.set_xlabel("time of a training step over that of Adam (1 = the same); bars are quartiles")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/training-step"),
    models: Annotated[str, typer.Option(help="Names of models, separated by semicolons.")] = "LeNet-5;ResNet-20",
    batch: Annotated[int, typer.Option(help="Samples in a batch.")] = 128,
    rounds: Annotated[int, typer.Option(help="How often each step is timed.")] = 15,
    steps: Annotated[str, typer.Option(help="Columns, separated by semicolons; Adam is always there.")] = ";".join(
        COLUMNS
    ),
) -> None:
    """Measure the training steps on all models."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "training_step.json"
    found = json.loads(file.read_text())["results"] if file.exists() else []
    results = {(result["model"], result["batch"]): result for result in found}
    for name in models.split(";"):
        wanted = list(dict.fromkeys([ADAM, *steps.split(";")]))
        results[name, batch] = in_fresh_process(measure, name, batch, rounds, wanted)
        rows = list(results.values())
        with replacing(file) as new:
            new.write_text(json.dumps({"machine": machine("ivon-opt"), "results": rows}, indent=2) + "\n")
        with replacing(file.with_suffix(".md")) as new:
            new.write_text(table(rows))
        with replacing(file.with_suffix(".png")) as new:
            picture(rows, new)
        print(table([results[name, batch]]), flush=True)


if __name__ == "__main__":
    typer.run(main)
