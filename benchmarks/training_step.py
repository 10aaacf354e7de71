"""Time of one training step: VOGN (draw, observe, update) against Adam and IVON.

    pip install ".[benchmarks]"
    python benchmarks/training_step.py --out runs/training-step

The optimizers take turns in a process of their own for each model: two steps each, of which the second is timed, as in
a loop that does nothing else. Ratios are to the Adam step of the same round. Writes `training_step.json` and
`training_step.md`.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import persample
from persample.files import replacing

sys.path.insert(0, str(Path(__file__).parent))
from gradients import in_fresh_process, machine, problem

DATA_SIZE = 50_000


def adam_step(model: nn.Module, inputs: Tensor, targets: Tensor) -> Callable[[], None]:
    """Return a step of Adam, as PyTorch ships it."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

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


def replayed_vogn_step(model: nn.Module, inputs: Tensor, targets: Tensor) -> Callable[[], None]:
    """Return the same with its moments recorded once."""
    return vogn_step(model, inputs, targets, compile=True)


def inductor_vogn_step(model: nn.Module, inputs: Tensor, targets: Tensor) -> Callable[[], None]:
    """Return the same with its moments recorded once, and compiled by Inductor."""
    return vogn_step(model, inputs, targets, compile="inductor")


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


STEPS = {
    "Adam": adam_step,
    "Adam, compiled": compiled_adam_step,
    "IVON": ivon_step,
    "VOGN": vogn_step,
    "VOGN, replayed": replayed_vogn_step,
    "VOGN, inductor": inductor_vogn_step,
    "moments alone": moments_alone,
    "noise alone": noise_alone,
}


def measure(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """Return the median time of each step, and the quartiles of its ratio to the Adam step."""
    model, inputs, targets = problem(name, batch)
    steps = {optimizer: make(copy.deepcopy(model), inputs, targets) for optimizer, make in STEPS.items()}
    seconds: dict[str, list[float]] = {optimizer: [] for optimizer in steps}
    for round_number in range(rounds + 3):
        for optimizer, step in steps.items():
            step()  # finds the caches and the memory that another one left
            start = time.perf_counter()
            step()
            if round_number >= 3:  # the first rounds check, choose forms and warm up
                seconds[optimizer].append(time.perf_counter() - start)
    results = {}
    for optimizer, took in seconds.items():
        ratios = [own / adam for own, adam in zip(took, seconds["Adam"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        results[optimizer] = {"seconds": statistics.median(took), "ratio": middle, "low": low, "high": high}
    return {"model": name, "batch": batch, "steps": results}


def table(results: list[dict[str, Any]]) -> str:
    """Return the ratios as a Markdown table, quartiles in brackets."""
    others = [name for name in STEPS if name != "Adam"]
    lines = ["| model | batch | Adam | " + " | ".join(others) + " |", "|---" * (len(others) + 3) + "|"]
    for result in results:
        steps = result["steps"]
        cells = [f"{1000 * steps['Adam']['seconds']:.1f} ms"]
        cells += [f"{steps[name]['ratio']:.2f} ({steps[name]['low']:.2f}–{steps[name]['high']:.2f})" for name in others]
        lines.append(f"| {result['model']} | {result['batch']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/training-step"),
    models: Annotated[str, typer.Option(help="Names of models, separated by semicolons.")] = "LeNet-5;ResNet-20",
    batch: Annotated[int, typer.Option(help="Samples in a batch.")] = 128,
    rounds: Annotated[int, typer.Option(help="How often each step is timed.")] = 30,
) -> None:
    """Measure the training steps on all models."""
    out.mkdir(parents=True, exist_ok=True)
    results = [in_fresh_process(measure, name, batch, rounds) for name in models.split(";")]
    report = {"machine": machine("ivon-opt"), "results": results}
    with replacing(out / "training_step.json") as new:
        new.write_text(json.dumps(report, indent=2) + "\n")
    with replacing(out / "training_step.md") as new:
        new.write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    typer.run(main)
