"""Time and peak memory of mean gradient and second moment, each backend against an ordinary backward pass.

    python benchmarks/gradients.py --out runs/gradients

Times alternate within one process; peak memory is taken in a fresh process for each model and backend. What refuses a
model, or disagrees with the oracle, is not timed. Writes `gradients.json`, `gradients.md` and `gradients.png`.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
import typer
from matplotlib.figure import Figure

import persample
from persample.checks.benchmark import PLAIN, plain_pass
from persample.checks.memory import peak_memory

sys.path.insert(0, str(Path(__file__).parent))
import peers
from models import PROBLEMS

BACKENDS = ["fused", "hooks", "vmap", "vmap in chunks", "backpack", "BackPACK itself", "opacus", "Opacus itself"]
BATCH = {"Transformer": 32, "Transformer, tied head": 32}


def problem(name: str, batch: int) -> tuple[Any, Any, Any]:
    """Return model, inputs and targets, the same in every process."""
    torch.manual_seed(0)
    return PROBLEMS[name](batch)


def measure(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """Return what all backends cost on one model."""
    model, inputs, targets = problem(name, batch)
    costs = persample.benchmark(
        model, persample.losses.cross_entropy, inputs, targets, backends=BACKENDS, rounds=rounds
    )
    results = {cost.backend: asdict(cost) for cost in costs}
    plain_memory = memory_in_fresh_process(name, batch, PLAIN)
    for backend, result in results.items():
        if result["problem"] is None:
            peak = memory_in_fresh_process(name, batch, backend)
            result |= {"peak_bytes": peak, "memory_ratio": peak / plain_memory}
    return {"model": name, "batch": batch, "costs": results}


def memory_in_fresh_process(name: str, batch: int, backend: str) -> int:
    """Return the peak memory of one call in bytes, parameters and batch included."""
    command = [sys.executable, __file__, "--memory-of", name, "--batch", str(batch), "--backend", backend]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def memory(name: str, batch: int, backend: str) -> int:
    """Return the same, in this process."""
    model, inputs, targets = problem(name, batch)
    loss_fn = persample.losses.cross_entropy
    if backend == PLAIN:
        call = plain_pass(model, loss_fn, inputs, targets)
    else:
        source = persample.make_source(backend, model, loss_fn, check="never")
        call = lambda: source.moments(inputs, targets)  # noqa: E731
    call()
    resident = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), inputs, targets))
    return resident + peak_memory(call, inputs.device)


def machine(*peers: str) -> dict[str, Any]:
    """Return what the figures depend on; `peers` are further packages that take part."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    packages = ("torch", "persample", *peers)
    return {
        "processor": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return the ratios as a Markdown table: time, and memory in brackets."""
    lines = ["| model | batch | " + " | ".join(BACKENDS) + " |", "|---" * (len(BACKENDS) + 2) + "|"]
    for result in results:
        cells = [_cell(result["costs"][backend]) for backend in BACKENDS]
        lines.append(f"| {result['model']} | {result['batch']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(cost: dict[str, Any]) -> str:
    if cost["problem"] is not None:
        return "–"
    spread = f"{cost['time_ratio_low']:.2f}–{cost['time_ratio_high']:.2f}"
    return f"{cost['time_ratio']:.2f} ({spread}), {cost['memory_ratio']:.2f}"


def picture(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the time ratios of all backends as bars, model by model."""
    figure = Figure(figsize=(11, 1 + 1.1 * len(results)), layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["tab10"]
    height = 0.8 / len(BACKENDS)
    for j, backend in enumerate(BACKENDS):
        for i, result in enumerate(results):
            cost = result["costs"][backend]
            if cost["problem"] is None:
                y = i + (j - len(BACKENDS) / 2) * height
                axes.barh(y, cost["time_ratio"], height, color=colours(j), label=backend if i == 0 else None)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks([1, 1.5, 2, 3, 5, 10, 20, 50], ["1", "1.5", "2", "3", "5", "10", "20", "50"])
    axes.minorticks_off()
    axes.set_yticks(range(len(results)), [f"{r['model']}\nbatch {r['batch']}" for r in results])
    axes.invert_yaxis()
    axes.set_xlabel("time over an ordinary forward and backward pass (1 = no extra cost)")
    axes.set_title("Mean gradient and exact second moment of the single samples")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/gradients"),
    models: Annotated[str, typer.Option(help="Names of models, separated by semicolons.")] = ";".join(PROBLEMS),
    batch: Annotated[int, typer.Option(help="Samples in a batch; 0 is each model's own.")] = 0,
    rounds: Annotated[int, typer.Option(help="How often each backend is timed.")] = 15,
    memory_of: Annotated[str, typer.Option(hidden=True)] = "",
    backend: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure all backends on all models."""
    peers.register()
    if memory_of:
        print(memory(memory_of, batch, backend))
        return
    out.mkdir(parents=True, exist_ok=True)
    results = []
    for name in models.split(";"):
        results.append(measure(name, batch or BATCH.get(name, 128), rounds))
        print(table(results[-1:]), flush=True)
        (out / "gradients.json").write_text(
            json.dumps({"machine": machine("backpack-for-pytorch", "opacus"), "results": results}, indent=2) + "\n"
        )
    (out / "gradients.md").write_text(table(results))
    picture(results, out / "gradients.png")
    print(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
