"""Time and peak memory of mean gradient and second moment, each backend against an ordinary backward pass.

    pip install ".[benchmarks]"
    python benchmarks/gradients.py --out runs/gradients
    python benchmarks/gradients.py --out runs/gradients-on-gpu --device cuda

The backends take turns in a process of their own for each model; peak memory is taken in a fresh process for each model
and backend. What refuses a model, or disagrees with the oracle, is not timed. "build before" is `fused` as it was
before its steps were recorded, taken from git; without git it is left out. Writes `gradients.json`, `gradients.md` and
`gradients.png`; what the folder holds of other models stays.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib import metadata
from multiprocessing import get_context
from operator import truediv
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import typer
from matplotlib.figure import Figure

import persample
from persample.checks.benchmark import PLAIN, alternate, plain_pass
from persample.checks.memory import peak_memory
from persample.files import replacing

sys.path.insert(0, str(Path(__file__).parent))
import further_backends
from earlier import EARLIER, in_turns, timed, with_earlier
from models import PROBLEMS

Result = TypeVar("Result")

BACKENDS = [
    *("fused", "fused, eager", "fused, replayed", "fused, inductor", "hooks", "vmap", "vmap in chunks"),
    *("backpack (extend)", "backpack (rules)", "opacus (module)", "opacus (rules)"),
]
PLAIN_COMPILED = "plain, compiled"
COLUMNS = [PLAIN_COMPILED, EARLIER, *BACKENDS]
GAIN = "build before over fused"
OWN_BATCH = {"Transformer": 32, "Transformer, tied head": 32}
ON_GPUS = "ResNet-18"  # takes minutes for each call of some backends on a CPU
LARGE = [("LeNet-5", 512), ("MLP", 512), ("ResNet-20", 512)]
JOBS = [(name, OWN_BATCH.get(name, 128)) for name in PROBLEMS if name != ON_GPUS] + LARGE
JOBS_ON_GPUS = [(name, 512) for name in PROBLEMS]


def problem(name: str, batch: int, device: str = "cpu") -> tuple[Any, Any, Any]:
    """Return model, inputs and targets, the same in every process."""
    torch.manual_seed(0)
    model, inputs, targets = PROBLEMS[name](batch)
    return model.to(device), inputs.to(device), targets.to(device)


def measure(name: str, batch: int, device: str, rounds: int, backends: list[str]) -> dict[str, Any]:
    """Return what the backends cost on one model."""
    model, inputs, targets = problem(name, batch, device)
    costs = persample.benchmark(
        model, persample.losses.cross_entropy, inputs, targets, backends=backends, rounds=rounds
    )
    return {"model": name, "batch": batch, "costs": {cost.backend: asdict(cost) for cost in costs}}


def measure_compiled(name: str, batch: int, device: str, rounds: int) -> dict[str, Any]:
    """Return what the ordinary pass costs under `torch.compile`, over that without."""
    model, inputs, targets = problem(name, batch, device)
    passes = {"": model, PLAIN_COMPILED: torch.compile(model)}
    calls = {way: plain_pass(m, persample.losses.cross_entropy, inputs, targets) for way, m in passes.items()}
    seconds = alternate(calls, rounds, torch.device(device))
    ratios = [own / plain for own, plain in zip(seconds[PLAIN_COMPILED], seconds[""], strict=True)]
    own = statistics.median(seconds[PLAIN_COMPILED])
    return {"backend": PLAIN_COMPILED, "problem": None, "seconds": own, "time_ratio": statistics.median(ratios)}


def measure_earlier(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """Return what the earlier build costs over the ordinary pass, and over `fused` of today in the same rounds."""
    given = problem(name, batch)
    loss_fn = persample.losses.cross_entropy
    source = persample.make_source("fused", given[0], loss_fn, check="never", compile=True)
    calls = {
        PLAIN: timed(plain_pass(given[0], loss_fn, *given[1:])),
        "fused": timed(lambda: source.moments(*given[1:])),
    }
    with with_earlier(calls, "moments", given) as all_calls:
        if EARLIER not in all_calls:
            return {"backend": EARLIER, "problem": "not in git here"}
        seconds = in_turns(all_calls, rounds, warm_up=10)  # until its steps are recorded
    ratio, gain = (statistics.median(map(truediv, seconds[EARLIER], seconds[other])) for other in (PLAIN, "fused"))
    own = statistics.median(seconds[EARLIER])
    return {"backend": EARLIER, "problem": None, "seconds": own, "time_ratio": ratio, "gain": gain}


def measure_memory(result: dict[str, Any], device: str) -> None:
    """Write the peak memory of all backends into the costs of one model."""
    name, batch = result["model"], result["batch"]
    plain = in_fresh_process(memory, name, batch, device, PLAIN)
    for backend, cost in result["costs"].items():
        if cost["problem"] is None and backend in BACKENDS:
            peak = in_fresh_process(memory, name, batch, device, backend)
            cost |= {"peak_bytes": peak, "memory_ratio": peak / plain}


def in_fresh_process(function: Callable[..., Result], *args: Any) -> Result:
    """Return what `function` returns in a process that has done nothing else, and whose memory is its own."""
    with ProcessPoolExecutor(1, get_context("spawn"), further_backends.register) as pool:
        return pool.submit(function, *args).result()


def memory(name: str, batch: int, device: str, backend: str) -> int:
    """Return the peak memory of one call in bytes, parameters and batch included."""
    model, inputs, targets = problem(name, batch, device)
    loss_fn = persample.losses.cross_entropy
    if backend == PLAIN:
        call = plain_pass(model, loss_fn, inputs, targets)
    else:
        source = persample.make_source(backend, model, loss_fn, check="never")
        call = lambda: source.moments(inputs, targets)  # noqa: E731
    call()
    resident = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), inputs, targets))
    return resident + peak_memory(call, inputs.device)


def machine(*peers: str, device: str = "cpu") -> dict[str, Any]:
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
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
    }


def table(results: list[dict[str, Any]], figure: Literal["time_ratio", "memory_ratio"]) -> str:
    """Return the ratios of time or memory as a Markdown table; – where a backend refuses the model."""
    timing = figure == "time_ratio"
    wanted = COLUMNS if timing else BACKENDS
    columns = [name for name in wanted if any(name in result["costs"] for result in results)]
    heads = [*columns, *([GAIN] if timing and EARLIER in columns else [])]
    lines = ["| model | batch | " + " | ".join(heads) + " |", "|---" * (len(heads) + 2) + "|"]
    for result in results:
        cells = [_cell(result["costs"].get(column), figure) for column in columns]
        if GAIN in heads:
            cells.append(_cell(result["costs"].get(EARLIER), "gain"))
        lines.append(f"| {result['model']} | {result['batch']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(cost: dict[str, Any] | None, figure: str) -> str:
    if cost is None or (figure not in cost and cost["problem"] is None):
        return "not run"
    return "–" if cost["problem"] is not None else f"{cost[figure]:.2f}"


def picture(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the time ratios of all backends as points, a line for each model, and name those that refuse it."""
    figure = Figure(figsize=(10, 1.5 + 0.55 * len(results)), layout="constrained")
    axes = figure.subplots()
    for backend, marker in zip(COLUMNS, "|*oHPXsDdv^<>", strict=True):
        costs = [(i, result["costs"].get(backend)) for i, result in enumerate(results)]
        points = [(cost["time_ratio"], i) for i, cost in costs if cost is not None and cost["problem"] is None]
        if not points:
            continue
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            marker,
            label=backend,
            markersize=9 if backend == "fused" else 6,
        )
    for i, result in enumerate(results):
        refused = [backend for backend in BACKENDS if (result["costs"].get(backend) or {}).get("problem")]
        if refused:
            axes.text(0.995, i, "refused: " + ", ".join(refused), ha="right", va="center", fontsize=7, color="grey",
                      transform=axes.get_yaxis_transform())  # fmt: skip
    axes.axvline(1, color="black", linewidth=1)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xscale("log")
    ticks = [t for t in (0.5, 0.8, 1, 1.5, 2, 3, 5, 10, 20, 50, 100) if axes.get_xlim()[0] < t < axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(results)), [f"{r['model']}, batch {r['batch']}" for r in results])
    axes.invert_yaxis()
    axes.set_xlabel("time over an ordinary forward and backward pass (1 = no extra cost)")
    axes.set_title("Mean gradient and exact second moment of the single samples")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/gradients"),
    models: Annotated[str, typer.Option(help="Names of models, separated by semicolons; all if empty.")] = "",
    batch: Annotated[int, typer.Option(help="Samples in a batch; 0 is each model's own.")] = 0,
    device: Annotated[str, typer.Option(help="Where to run: cpu or cuda.")] = "cpu",
    rounds: Annotated[int, typer.Option(help="How often each backend is timed; 0 keeps what is there.")] = 15,
    memory_too: Annotated[bool, typer.Option("--memory/--no-memory", help="Take the peak memory, too.")] = True,
    backends: Annotated[str, typer.Option(help="Names of backends, separated by semicolons.")] = ";".join(COLUMNS),
) -> None:
    """Measure all backends on all models."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "gradients.json"
    found = json.loads(file.read_text())["results"] if file.exists() else []
    results = {(result["model"], result["batch"]): result for result in found}
    own_jobs = JOBS if device == "cpu" else JOBS_ON_GPUS
    wanted = models.split(";") if models else list(dict.fromkeys(name for name, _ in own_jobs))
    jobs = [(name, batch) for name in wanted] if batch else [job for job in own_jobs if job[0] in wanted]
    for job in jobs:
        if rounds:
            names = backends.split(";")
            results[job] = in_fresh_process(measure, *job, device, rounds, [n for n in names if n in BACKENDS])
            costs = results[job]["costs"]
            if PLAIN_COMPILED in names:
                costs[PLAIN_COMPILED] = in_fresh_process(measure_compiled, *job, device, rounds)
            if EARLIER in names and device == "cpu":
                costs[EARLIER] = in_fresh_process(measure_earlier, *job, rounds)
        if memory_too:
            measure_memory(results[job], device)
        print(table([results[job]], "time_ratio"), flush=True)
        write(file, [results[job] for job in sorted(results, key=order)], device)


def order(job: tuple[str, int]) -> tuple[int, int]:
    """Return the place of a model and batch size in the table."""
    return JOBS.index(job) if job in JOBS else len(JOBS), job[1]


def write(file: Path, results: list[dict[str, Any]], device: str) -> None:
    """Write the results, the table and the picture."""
    report = {"machine": machine("backpack-for-pytorch", "opacus", device=device), "results": results}
    with replacing(file) as new:
        new.write_text(json.dumps(report, indent=2) + "\n")
    with replacing(file.with_suffix(".md")) as new:
        new.write_text("Time:\n\n" + table(results, "time_ratio") + "\nMemory:\n\n" + table(results, "memory_ratio"))
    with replacing(file.with_suffix(".png")) as new:
        picture(results, new)
    print(f"written to {file.parent}")


if __name__ == "__main__":
    typer.run(main)
