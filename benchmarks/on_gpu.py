"""One visit to a GPU: run the tests on it, then measure moments and training steps, within the minutes that there are.

    python benchmarks/on_gpu.py --minutes 9 --out runs/on-gpu
    python benchmarks/on_gpu.py --device cpu --quick --out runs/rehearsal    # the same, small, without a GPU

Needs nothing but PyTorch and `src` on the path; pytest, matplotlib, BackPACK, Opacus and IVON take part where they can
be imported. Each part runs in a process of its own, the most important first, and is written down as soon as it is
there: `report.json`, `report.md` and `picture.png`. When the time is over, what is there stays; the same command goes
on with the parts that are missing.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import persample
from models import LARGE_PROBLEMS, PROBLEMS
from persample.checks.memory import peak_memory
from persample.files import replacing

HERE = Path(__file__).resolve().parent
TESTS = ("conformance", "vogn", "sources", "checks", "testing")
BATCHES = {
    **{"LeNet-5": 512, "ResNet-18": 512, "GPT-2 small": 16, "ViT-S": 128, "MNIST ConvNet": 512},
    **{"ResNet-50": 64, "Transformer": 512, "MLP": 512, "ResNet-20": 512, "VGG-like": 512},
}
SMALL = {"MNIST ConvNet": 4}
DATA_SIZE = 50_000
SECONDS_OF_A_MODEL = 75
SECONDS_OF_TESTS = 240


@dataclass(frozen=True)
class Part:
    """One part of a visit: its name, and the arguments by which this file runs it in a process of its own."""

    name: str
    arguments: tuple[str, ...]
    seconds: float


def parts_of(quick: bool) -> list[Part]:
    """Return the parts in the order of their importance."""
    names = list(SMALL if quick else BATCHES)
    tests = [Part("tests", ("--part", "tests"), SECONDS_OF_TESTS)]
    measured = [Part(name, ("--part", name), SECONDS_OF_A_MODEL) for name in names]
    return [*measured[:1], *tests, *measured[1:]]


# The visit.


def visit(arguments: argparse.Namespace) -> int:
    """Run the parts that are missing, until the time is over; return how many failed."""
    end = time.monotonic() + 60 * arguments.minutes
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "report.json"
    report = json.loads(file.read_text()) if file.exists() else {"parts": {}}
    report["machine"] = machine(arguments.device)
    print(json.dumps(report["machine"], indent=2), flush=True)
    for part in parts_of(arguments.quick):
        left = end - time.monotonic()
        if report["parts"].get(part.name, {}).get("complete"):
            continue
        if left < 20:
            report["parts"].setdefault(part.name, {"problem": "no time was left"})
            continue
        report["parts"][part.name] = run(part, min(part.seconds, left - 10), arguments)
        write(report, arguments.out)
    write(report, arguments.out)
    return sum("problem" in part for part in report["parts"].values())


def run(part: Part, seconds: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one part in a process of its own; return what it found, and why it found no more."""
    result = arguments.out / f"{re.sub(r'[^A-Za-z0-9]+', '-', part.name)}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), *part.arguments, "--device", arguments.device]
    command += ["--out", str(arguments.out), "--result", str(result), "--seconds", str(seconds)]
    command += ["--quick"] if arguments.quick else []
    started = time.monotonic()
    problem = None
    log = arguments.out / f"{result.stem}.log"
    with log.open("w") as output:
        try:
            done = subprocess.run(command, stdout=output, stderr=output, timeout=seconds + 5, check=False)
            if done.returncode:
                problem = f"ended with {done.returncode}: " + "".join(log.read_text().splitlines(True)[-3:])
        except subprocess.TimeoutExpired:
            problem = f"stopped after {seconds:.0f} seconds"
    found = json.loads(result.read_text()) if result.exists() else {}
    found["seconds"] = round(time.monotonic() - started, 1)
    if problem is not None:
        found["problem"] = problem
    found["complete"] = problem is None
    print(f"{part.name}: {problem or 'done'} ({found['seconds']} s)", flush=True)
    return found


def machine(device: str) -> dict[str, Any]:
    """Return what the figures depend on."""
    on_gpu = device != "cpu"
    names = ("pytest", "xdist", "matplotlib", "opacus", "backpack", "ivon", "triton")
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda if on_gpu else None,
        "python": platform.python_version(),
        "importable": [name for name in names if importlib.util.find_spec(name)],
    }


# The tests.


def tests(device: str, out: Path, seconds: float, quick: bool) -> dict[str, Any]:
    """Run the tests on the device; return how many passed, and what failed."""
    if importlib.util.find_spec("pytest") is None:
        return {"problem": "pytest cannot be imported"}
    root = HERE.parent
    folders = [str(root / "tests" / name) for name in TESTS]
    chosen = [str(root / "tests" / "vogn" / "test_core.py")] if quick else folders
    command = [sys.executable, "-m", "pytest", *chosen, "-p", "no:cacheprovider", "--tb=line", "-rfE"]
    command += ["--ignore", str(root / "tests" / "vogn" / "processes")]
    if importlib.util.find_spec("xdist") and not quick:
        command += ["-n", str(min(15, os.cpu_count() or 1)), "--dist", "worksteal"]
    environment = os.environ | {"PERSAMPLE_TEST_DEVICE": device, "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root / "src"), os.environ.get("PYTHONPATH", "")])
    log = out / "pytest.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=root, env=environment)
        try:
            process.wait(timeout=seconds - 20)
            stopped = False
        except subprocess.TimeoutExpired:
            process.send_signal(2)  # so that pytest tells what failed
            stopped = True
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
    lines = log.read_text().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    last = next((line for line in reversed(lines) if " passed" in line or " failed" in line), "no summary")
    return {"summary": last.strip("= "), "failed": failed[:400]} | ({"problem": "time was over"} if stopped else {})


# The measurement of one model.


Call = Callable[[], Any]


def measure(name: str, device: str, save: Callable[[dict[str, Any]], None], seconds: float, quick: bool) -> None:
    """Time moments and steps on one model, all ways in turn, and take the peak memory; `save` what is there."""
    end = time.monotonic() + seconds
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    batch = (SMALL if quick else BATCHES)[name]
    torch.manual_seed(0)
    model, inputs, targets = (PROBLEMS | LARGE_PROBLEMS)[name](batch)
    model, inputs, targets = model.to(device), inputs.to(device), targets.to(device)
    report: dict[str, Any] = {"batch": batch, "parameters": sum(p.numel() for p in model.parameters())}
    report |= {"moments": {}, "steps": {}, "refused": {}}
    graphs = {} if device == "cpu" else {"plain": plain, IN_A_CUDA_GRAPH: moments_by("fused", compile="cuda-graph")}
    # A capture that fails leaves nothing that works, so it comes last.
    for kind, makers in (("moments", MOMENTS), ("steps", STEPS), ("moments", graphs)):
        calls: dict[str, Call] = {}
        for way, make in makers.items():
            if quick and way in SLOW_TO_MAKE:
                continue
            if time.monotonic() > end - 5:
                report["refused"][way] = "no time was left"
                continue
            try:
                call = make(copy.deepcopy(model), inputs, targets)
                for _ in range(3):
                    call()
                synchronize(device)
            except Exception as error:  # noqa: BLE001  what cannot run is a finding
                report["refused"][way] = f"{type(error).__name__}: {str(error)[:300]}"
                torch.cuda.empty_cache()
                continue
            calls[way] = call
        for way, call in calls.items():
            if kind == "moments":
                report["moments"][way] = {"peak_bytes": peak_memory(call, torch.device(device))}
        if device != "cpu" and makers is not graphs:
            own = {way: call for way, call in calls.items() if way in ("fused", "fused, replayed", "VOGN")}
            report.setdefault("waits for the GPU", {}).update({way: waits(call) for way, call in own.items()})
            report.setdefault("kernels", {}).update({way: kernels(call) for way, call in own.items()})
        times = alternate(calls, device, rounds=2 if quick else 9, end=end)
        if not times:
            continue
        baseline = next(iter(calls))
        for way, took in times.items():
            ratios = [own / plain for own, plain in zip(took, times[baseline], strict=True)]
            entry = report[kind].setdefault(way, {})
            entry |= {"milliseconds": statistics.median(took), "ratio": statistics.median(ratios)}
            entry |= {"lowest": min(ratios), "highest": max(ratios)}
        calls.clear()
        torch.cuda.empty_cache()
        save(report)


def alternate(calls: Mapping[str, Call], device: str, rounds: int, end: float) -> dict[str, list[float]]:
    """Return the milliseconds of each call, one of each in every round; fewer rounds where the time is over."""
    times: dict[str, list[float]] = {way: [] for way in calls}
    for number in range(rounds):
        if number >= 3 and time.monotonic() > end - 5:
            break
        for way, call in calls.items():
            call()  # finds the caches that another one left
            with stopwatch(device) as took:
                call()
            times[way] += took
    return times


@contextmanager
def stopwatch(device: str) -> Iterator[list[float]]:
    """Append the milliseconds of the block to the list that is yielded; by CUDA's events on a GPU."""
    took: list[float] = []
    synchronize(device)
    if device == "cpu":
        start = time.perf_counter()
        yield took
        took.append(1000 * (time.perf_counter() - start))
        return
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    yield took
    last.record()
    synchronize(device)
    took.append(first.elapsed_time(last))


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def waits(call: Call) -> list[str]:
    """Return where a call makes the processor wait for the GPU."""
    found: list[str] = []

    def note(*_: Any, **__: Any) -> None:
        own = [frame for frame in traceback.extract_stack() if "persample" in frame.filename]
        found.append(" < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in own[::-1][:3]))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return found


def kernels(call: Call) -> list[str]:
    """Return what the GPU spends its time on."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    averages = sorted(profiler.key_averages(), key=lambda average: -average.device_time_total)
    return [f"{a.device_time_total / 1000:.2f} ms, {a.count} times: {a.key[:120]}" for a in averages[:12]]


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the losses."""
    return F.cross_entropy(outputs, targets, reduction="sum")


def plain(model: nn.Module, inputs: Tensor, targets: Tensor) -> Call:
    """An ordinary forward and backward pass."""
    parameters = list(model.parameters())
    return lambda: torch.autograd.grad(loss_of(model(inputs), targets), parameters)


def plain_compiled(model: nn.Module, inputs: Tensor, targets: Tensor) -> Call:
    """The same under torch.compile."""
    return plain(torch.compile(model), inputs, targets)  # type: ignore[arg-type]


def moments_by(backend: str, **options: Any) -> Callable[..., Call]:
    """Moments from a backend, after one call with the self-check."""

    def make(model: nn.Module, inputs: Tensor, targets: Tensor) -> Call:
        loss_fn = persample.losses.cross_entropy
        few = min(len(inputs), 8)  # the self-check and its loop on some of the samples
        persample.make_source(backend, model, loss_fn, check="first", **options).moments(inputs[:few], targets[:few])
        source = persample.make_source(backend, model, loss_fn, check="never", **options)
        source.moments(inputs, targets)
        if options.get("compile") and source.ran == "eager":
            raise RuntimeError(f"not recorded: {source.ran_because}")
        return lambda: source.moments(inputs, targets)

    return make


def adam(model: nn.Module, inputs: Tensor, targets: Tensor) -> Call:
    """A step of PyTorch's fastest Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def vogn(model: nn.Module, inputs: Tensor, targets: Tensor) -> Call:
    """A step of VOGN with one draw."""
    loss_fn = persample.losses.cross_entropy
    optimizer = persample.VOGN(model, loss_fn, data_size=DATA_SIZE, lr=1e-5, hess_init=0.1, momentum=0.9)

    def step() -> None:
        optimizer.observe(inputs, targets)
        optimizer.step()

    return step


def ivon(model: nn.Module, inputs: Tensor, targets: Tensor) -> Call:
    """A step of IVON with one draw."""
    from ivon import IVON

    optimizer = IVON(model.parameters(), lr=1e-4, ess=DATA_SIZE)

    def step() -> None:
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


MOMENTS: dict[str, Callable[..., Call]] = {
    "plain": plain,
    "plain, compiled": plain_compiled,
    "fused": moments_by("fused"),
    "fused, replayed": moments_by("fused", compile=True),
    "hooks": moments_by("hooks"),
    "vmap": moments_by("vmap"),
    "Opacus": moments_by("opacus", machinery="module"),
    "BackPACK": moments_by("backpack", machinery="extend"),
    "fused, Inductor": moments_by("fused", compile="inductor"),
}
STEPS: dict[str, Callable[..., Call]] = {"Adam": adam, "VOGN": vogn, "IVON": ivon}
SLOW_TO_MAKE = ("plain, compiled", "fused, Inductor")
IN_A_CUDA_GRAPH = "fused in a CUDA graph"


# The report.


def write(report: dict[str, Any], out: Path) -> None:
    """Write the report as JSON, as tables, and as a picture where matplotlib can be imported."""
    with replacing(out / "report.json") as new:
        new.write_text(json.dumps(report, indent=2) + "\n")
    with replacing(out / "report.md") as new:
        new.write_text(tables(report))
    measured = {name: part for name, part in report["parts"].items() if part.get("moments")}
    if measured and importlib.util.find_spec("matplotlib"):
        with replacing(out / "picture.png") as new:
            picture(measured, new, report["machine"]["device"])


def tables(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    told = report["machine"]
    lines = [f"{told['device']}, PyTorch {told['torch']}, CUDA {told['CUDA']}, float32 without TF32", ""]
    measured = {name: part for name, part in report["parts"].items() if part.get("moments")}
    ways = {**MOMENTS, IN_A_CUDA_GRAPH: plain}
    for kind, key, makers in (("moments", "ratio", ways), ("steps", "ratio", STEPS), ("memory", "memory", ways)):
        lines += [f"{kind} ({'ratio to ' + next(iter(makers))})", ""]
        lines += ["| model | batch | " + " | ".join(makers) + " |", "|---" * (len(makers) + 2) + "|"]
        for name, part in measured.items():
            found = part["steps" if kind == "steps" else "moments"]
            base = found.get(next(iter(makers)), {})
            cells = []
            for way in makers:
                entry = found.get(way, {})
                if way == next(iter(makers)) and kind != "memory" and "milliseconds" in entry:
                    cells.append(f"{entry['milliseconds']:.2f} ms")
                elif key == "memory" and "peak_bytes" in entry:
                    cells.append(f"{entry['peak_bytes'] / max(base['peak_bytes'], 1):.2f}")
                else:
                    cells.append(f"{entry['ratio']:.2f}" if "ratio" in entry and key == "ratio" else "–")
            lines.append(f"| {name} | {part['batch']} | " + " | ".join(cells) + " |")
        lines.append("")
    for name, part in report["parts"].items():
        lines += [f"- {name}: {part['problem'].strip()}"] if "problem" in part else []
        lines += [f"- {name}, {way}: {why}" for way, why in part.get("refused", {}).items()]
        lines += (
            [f"- {name}: {part['summary']}", *(f"  - {line}" for line in part["failed"])] if "failed" in part else []
        )
    return "\n".join(lines) + "\n"


def picture(measured: Mapping[str, Any], path: Path, device: str) -> None:
    """Draw the ratios of the moments as points, a line of the picture for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.5 + 0.5 * len(measured)), layout="constrained")
    axes = figure.subplots()
    for index, way in enumerate([*(w for w in MOMENTS if w != "plain"), IN_A_CUDA_GRAPH]):
        found = [(i, part["moments"].get(way, {}).get("ratio")) for i, part in enumerate(measured.values())]
        points = [(ratio, i) for i, ratio in found if ratio is not None]
        if points:
            axes.plot(*zip(*points, strict=True), "o^sDvP*X<>"[index], label=way, markersize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(measured)), [f"{name}, batch {part['batch']}" for name, part in measured.items()])
    axes.invert_yaxis()
    axes.set_xlabel("time over an ordinary forward and backward pass")
    axes.set_title(f"Moments of the gradients on {device}")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120, format="png")


def main() -> int:
    """Read the arguments, and run the visit or one of its parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="how long the visit may take")
    parser.add_argument("--out", type=Path, default=Path("runs/on-gpu"), help="folder for the report")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal")
    parser.add_argument("--quick", action="store_true", help="one small model and few tests")
    for own in ("--part", "--result"):
        parser.add_argument(own, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device != "cpu" and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU; --device cpu --quick rehearses the visit without one")
    if arguments.part is None:
        return visit(arguments)

    def save(found: dict[str, Any]) -> None:
        with replacing(Path(arguments.result)) as new:
            new.write_text(json.dumps(found))

    if arguments.part == "tests":
        save(tests(arguments.device, arguments.out, arguments.seconds, arguments.quick))
    else:
        measure(arguments.part, arguments.device, save, arguments.seconds, arguments.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
