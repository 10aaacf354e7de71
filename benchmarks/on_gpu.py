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
import signal
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
from persample.kernels.compiled import without_kernels
from persample.sources.backends.fused.replay import untried

HERE = Path(__file__).resolve().parent
#: The tests of a part, in `tests/`; first what no GPU has run yet.
TESTS = {
    "newest tests": (
        *("kernels/test_triton_step.py", "kernels/test_step.py", "vogn/rules/test_update_kernel.py"),
        *(
            "vogn/test_waiting.py",
            "sources/backends/fused/replay/test_runners.py",
            "sources/model/test_recurrent_layers.py",
        ),
    ),
    "tests": ("kernels", "conformance", "vogn", "sources", "checks", "testing"),
}
FEW_TESTS = {"newest tests": ("sources/model/test_recurrent_layers.py",), "tests": ("vogn/test_core.py",)}
BATCHES = {
    **{"ResNet-18": 512, "GPT-2 small": 16, "ViT-S": 128, "LeNet-5": 512, "MNIST ConvNet": 512},
    **{"ResNet-50": 64, "VGG-like": 512, "Transformer": 512, "MLP": 512, "ResNet-20": 512},
}
LAUNCH_BOUND = ("LeNet-5", "MNIST ConvNet", "MLP")
SMALL = {"MNIST ConvNet": 4}
DATA_SIZE = 50_000
SECONDS = {"own": 100, "in a CUDA graph": 40, "others": 60, "compiled": 60, "newest tests": 75, "tests": 240}
SLOWEST = 3  # models whose profiles are shown


@dataclass(frozen=True)
class Part:
    """One part of a visit, which this file runs in a process of its own.

    Attributes:
        subject: a model, or the name of some tests.
        stage: what is measured on the model; empty for tests.
    """

    subject: str
    stage: str = ""

    @property
    def name(self) -> str:
        """The name of the part in the report."""
        return f"{self.subject}: {self.stage}" if self.stage else self.subject


def parts_of(quick: bool) -> list[Part]:
    """Return the parts in the order of their importance: what was not measured on a GPU comes first."""
    if quick:
        return [*(Part(name, stage) for name in SMALL for stage in ("own", "others")), *map(Part, TESTS)]
    models = list(BATCHES)
    graphs = [Part(name, "in a CUDA graph") for name in LAUNCH_BOUND]
    return [
        *(Part(name, "own") for name in models[:5]),
        *graphs[:2],
        *map(Part, TESTS),
        *(Part(name, "others") for name in models[:5]),
        *(Part(name, "own") for name in models[5:]),
        *(Part(name, "compiled") for name in models[:5]),
        *graphs[2:],
        *(Part(name, stage) for name in models[5:] for stage in ("others", "compiled")),
    ]


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
        seconds = SECONDS[part.stage or part.subject]
        report["parts"][part.name] = run(part, min(seconds, left - 10), arguments)
        write(report, arguments.out)
    write(report, arguments.out)
    return sum("problem" in part for part in report["parts"].values())


def run(part: Part, seconds: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one part in a process of its own; return what it found, and why it found no more."""
    result = arguments.out / f"{re.sub(r'[^A-Za-z0-9]+', '-', part.name)}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--part", part.subject, "--stage", part.stage]
    command += ["--device", arguments.device]
    command += ["--out", str(arguments.out), "--result", str(result), "--seconds", str(seconds)]
    command += ["--quick"] if arguments.quick else []
    started = time.monotonic()
    problem = None
    log = arguments.out / f"{result.stem}.log"
    with log.open("w") as output:
        environment = {"PERSAMPLE_CACHE": str(arguments.out.resolve() / "launches"), **os.environ}  # goes on, too
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, env=environment)
        try:
            if process.wait(timeout=seconds + 5):
                problem = f"ended with {process.returncode}: " + "".join(log.read_text().splitlines(True)[-3:])
        except subprocess.TimeoutExpired:
            problem = f"stopped after {seconds:.0f} seconds"
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
            process.wait()
    found = json.loads(result.read_text()) if result.exists() else {}
    found["seconds"] = round(time.monotonic() - started, 1)
    if problem is not None:
        found["problem"] = problem
    found |= {"subject": part.subject, "complete": "problem" not in found}
    print(f"{part.name}: {found.get('problem', 'done')} ({found['seconds']} s)", flush=True)
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


def tests(name: str, device: str, out: Path, seconds: float, quick: bool) -> dict[str, Any]:
    """Run some tests on the device; return how many passed, and what failed."""
    if importlib.util.find_spec("pytest") is None:
        return {"problem": "pytest cannot be imported"}
    root = HERE.parent
    chosen = [str(root / "tests" / path) for path in (FEW_TESTS if quick else TESTS)[name]]
    command = [sys.executable, "-m", "pytest", *chosen, "-p", "no:cacheprovider", "--tb=line", "-rfE"]
    command += ["--ignore", str(root / "tests" / "vogn" / "distributed")]
    if importlib.util.find_spec("xdist") and not quick:
        command += ["-n", str(min(15, os.cpu_count() or 1)), "--dist", "worksteal"]
    environment = os.environ | {"PERSAMPLE_TEST_DEVICE": device, "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root / "src"), os.environ.get("PYTHONPATH", "")])
    log = out / f"pytest-{name.replace(' ', '-')}.log"
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


def measure(
    name: str, stage: str, device: str, save: Callable[[dict[str, Any]], None], seconds: float, quick: bool
) -> None:
    """Time the ways of a stage on one model, all in turn, and take the peak memory; `save` what is there."""
    end = time.monotonic() + seconds
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    batch = (SMALL if quick else BATCHES)[name]
    torch.manual_seed(0)
    model, inputs, targets = (PROBLEMS | LARGE_PROBLEMS)[name](batch)
    model, inputs, targets = model.to(device), inputs.to(device), targets.to(device)
    report: dict[str, Any] = {"batch": batch, "parameters": sum(p.numel() for p in model.parameters())}
    report |= {"moments": {}, "steps": {}, "refused": {}}
    for kind, makers in STAGES[stage].items():
        calls: dict[str, Call] = {}
        for way, make in makers.items():
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
            with stopwatch(device) as took:  # in case there is no time for more
                call()
            base = report[kind].get(next(iter(calls)), {}).get("milliseconds", took[0])
            report[kind][way] = {"milliseconds": took[0], "ratio": took[0] / base}
            save(report)
        for way, call in calls.items():
            report[kind][way]["peak_bytes"] = peak_memory(call, torch.device(device))
        times = alternate(calls, device, rounds=2 if quick else 9, end=end)
        baseline = next(iter(calls), "")
        for way, took in times.items():
            ratios = [own / plain for own, plain in zip(took, times[baseline], strict=True)]
            entry = report[kind][way]
            entry |= {"milliseconds": statistics.median(took), "ratio": statistics.median(ratios)}
            entry |= {"lowest": min(ratios), "highest": max(ratios)}
        save(report)
        for way in PROFILED & calls.keys():
            report.setdefault("kernels", {})[way] = kernels(calls[way], device)
            if device != "cpu":
                report.setdefault("waits for the GPU", {})[way] = waits(calls[way])
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


def kernels(call: Call, device: str) -> list[str]:
    """Return what the device spends its time on."""
    activity = torch.profiler.ProfilerActivity.CPU if device == "cpu" else torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profiler:
        call()
        synchronize(device)
    took = {a.key: a.self_cpu_time_total if device == "cpu" else a.device_time_total for a in profiler.key_averages()}
    counts = {a.key: a.count for a in profiler.key_averages()}
    most = sorted(took, key=lambda key: -took[key])[:12]
    return [f"{took[key] / 1000:.2f} ms, {counts[key]} times: {key[:120]}" for key in most]


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


def vogn(**options: Any) -> Callable[..., Call]:
    """Steps of VOGN with one draw."""

    def make(model: nn.Module, inputs: Tensor, targets: Tensor) -> Call:
        loss_fn = persample.losses.cross_entropy
        checked = {"check": "never", **options}
        optimizer = persample.VOGN(
            model, loss_fn, data_size=DATA_SIZE, lr=1e-5, hess_init=0.1, momentum=0.9, backend_options=checked
        )

        def step() -> None:
            optimizer.observe(inputs, targets)
            optimizer.step()

        step()
        if options.get("compile") and optimizer.source.ran == "eager":
            raise RuntimeError(f"not recorded: {optimizer.source.ran_because}")
        return step

    return make


def own_ivon(model: nn.Module, inputs: Tensor, targets: Tensor) -> Call:
    """A step of this package's IVON with one draw."""
    optimizer = persample.IVON(model, persample.losses.cross_entropy, data_size=DATA_SIZE, lr=1e-4)

    def step() -> None:
        optimizer.observe(inputs, targets)
        optimizer.step()

    return step


def ivon(model: nn.Module, inputs: Tensor, targets: Tensor) -> Call:
    """A step of the package ivon-opt with one draw."""
    from ivon import IVON

    optimizer = IVON(model.parameters(), lr=1e-4, ess=DATA_SIZE)

    def step() -> None:
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def without_triton(make: Callable[..., Call]) -> Callable[..., Call]:
    """Return the same way without the Triton kernels, by PyTorch's own operations."""

    def made(*problem: Any) -> Call:
        with without_kernels():
            call = make(*problem)

        def run() -> Any:
            with without_kernels():
                return call()

        return run

    return made


PLAIN, ADAM = {"plain": plain}, {"Adam": adam}
IN_A_CUDA_GRAPH = "fused in a CUDA graph"
#: The ways that a stage measures; the first of each kind is what the others are compared with.
STAGES: dict[str, dict[str, dict[str, Callable[..., Call]]]] = {
    "own": {
        "moments": PLAIN
        | {"fused": moments_by("fused"), "fused, eager": moments_by("fused", compile=False)}
        | {"fused, replayed": moments_by("fused", compile=True)}
        | {"fused, eager, without Triton": without_triton(moments_by("fused", compile=False))},
        "steps": ADAM
        | {"VOGN": vogn(), "VOGN, eager": vogn(compile=False), "VOGN, replayed": vogn(compile=True)}
        | {"VOGN, eager, without Triton": without_triton(vogn(compile=False))}
        | {"IVON": own_ivon, "ivon-opt": ivon},
    },
    # A capture that fails leaves nothing that works, so these have a process of their own.
    "in a CUDA graph": {
        "moments": PLAIN | {IN_A_CUDA_GRAPH: moments_by("fused", compile="cuda-graph")},
        "steps": ADAM | {"VOGN in a CUDA graph": vogn(compile="cuda-graph")},
    },
    "others": {
        "moments": PLAIN
        | {"hooks": moments_by("hooks"), "vmap": moments_by("vmap")}
        | {"Opacus": moments_by("opacus", machinery="module"), "BackPACK": moments_by("backpack", machinery="extend")},
    },
    "compiled": {
        "moments": PLAIN
        | {"plain, compiled": plain_compiled, "fused, Inductor": moments_by("fused", compile="inductor")},
    },
}
#: All ways of a kind.
WAYS = {kind: {way: None for stage in STAGES.values() for way in stage.get(kind, ())} for kind in ("moments", "steps")}
PROFILED = {"fused, eager", "fused, replayed", "VOGN"}


# The report.


def write(report: dict[str, Any], out: Path) -> None:
    """Write the report as JSON, as tables, and as a picture where matplotlib can be imported."""
    with replacing(out / "report.json") as new:
        new.write_text(json.dumps(report, indent=2) + "\n")
    with replacing(out / "report.md") as new:
        new.write_text(tables(report))
    models = by_model(report)
    if models and importlib.util.find_spec("matplotlib"):
        with replacing(out / "picture.png") as new:
            picture(models, new, report["machine"]["device"])


def by_model(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what all stages found on a model, by its name."""
    models: dict[str, dict[str, Any]] = {}
    for part in report["parts"].values():
        if not part.get("moments"):
            continue
        model = models.setdefault(part["subject"], {"batch": part["batch"], "moments": {}, "steps": {}, "kernels": {}})
        for kind in ("moments", "steps", "kernels"):
            model[kind] = part.get(kind, {}) | model[kind]  # of the baseline, what the first stage found
    return models


def tables(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    told, models = report["machine"], by_model(report)
    lines = [f"{told['device']}, PyTorch {told['torch']}, CUDA {told['CUDA']}, float32 without TF32", ""]
    for what, kind, key in (
        ("time of moments", "moments", "ratio"),
        ("time of a step", "steps", "ratio"),
        ("peak memory of moments", "moments", "peak_bytes"),
        ("peak memory of a step", "steps", "peak_bytes"),
    ):
        ways = list(WAYS[kind])
        lines += [f"{what}, as a ratio to {ways[0]!r}", "", "| model | batch | " + " | ".join(ways) + " |"]
        lines += ["|---" * (len(ways) + 2) + "|"]
        for name, model in models.items():
            cells = [cell(model[kind], way, ways[0], key) for way in ways]
            lines.append(f"| {name} | {model['batch']} | " + " | ".join(cells) + " |")
        lines.append("")
    for name in slowest(models):
        for way, most in models[name]["kernels"].items():
            lines += [f"{name}, {way}:", "", *(f"    {line}" for line in most), ""]
    for name, part in report["parts"].items():
        lines += [f"- {name}: {part['problem'].strip()}"] if "problem" in part else []
        lines += [f"- {name}, {way}: {why}" for way, why in part.get("refused", {}).items()]
        lines += [f"- {name}, {way}, waits: {where}" for way, where in part.get("waits for the GPU", {}).items()]
        lines += (
            [f"- {name}: {part['summary']}", *(f"  - {line}" for line in part["failed"])] if "failed" in part else []
        )
    return "\n".join(lines) + "\n"


def cell(found: Mapping[str, Any], way: str, baseline: str, key: str) -> str:
    """Return a cell of a table: a ratio, or what the ratios are to."""
    entry, base = found.get(way, {}), found.get(baseline, {})
    if key == "ratio" and way == baseline and "milliseconds" in entry:
        return f"{entry['milliseconds']:.2f} ms"
    if key == "ratio":
        return f"{entry['ratio']:.2f}" if "ratio" in entry else "–"
    if way == baseline and key in entry:
        return f"{entry[key] / 2**20:.0f} MiB"
    return f"{entry[key] / max(base[key], 1):.2f}" if key in entry and key in base else "–"


def slowest(models: Mapping[str, Any]) -> list[str]:
    """Return the models on which moments take longest beside an ordinary pass."""
    ratios = {name: model["moments"].get("fused", {}).get("ratio", 0.0) for name, model in models.items()}
    return sorted(ratios, key=lambda name: -ratios[name])[:SLOWEST]


def picture(models: Mapping[str, Any], path: Path, device: str) -> None:
    """Draw the ratios as points, moments and steps side by side, a line of the picture for each model."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(16, 2.8 + 0.5 * len(models)), layout="constrained")
    named = {"moments": "an ordinary forward and backward pass", "steps": "a step of Adam"}
    labels = [f"{name}, batch {model['batch']}" for name, model in models.items()]
    for half, kind in zip(figure.subfigures(1, 2), named, strict=True):
        axes = half.subplots()
        for index, way in enumerate(list(WAYS[kind])[1:]):
            found = [(model[kind].get(way, {}).get("ratio"), i) for i, model in enumerate(models.values())]
            points = [(ratio, i) for ratio, i in found if ratio is not None]
            if points:
                axes.plot(*zip(*points, strict=True), "o^sDvP*X<>pH"[index % 12], label=way, markersize=8)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(f"time over {named[kind]}")
        axes.set_title("moments of the gradients" if kind == "moments" else "training steps")
        axes.set_yticks(range(len(models)), labels)
        axes.set_ylim(len(models) - 0.5, -0.5)
        half.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(f"On {device}")
    figure.savefig(path, dpi=120, format="png")


def main() -> int:
    """Read the arguments, and run the visit or one of its parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="how long the visit may take")
    parser.add_argument("--out", type=Path, default=Path("runs/on-gpu"), help="folder for the report")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal")
    parser.add_argument("--quick", action="store_true", help="one small model and few tests")
    for own in ("--part", "--stage", "--result"):
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

    if arguments.part in TESTS:
        save(tests(arguments.part, arguments.device, arguments.out, arguments.seconds, arguments.quick))
    else:
        untried.DYNAMO_SEES_CHANGES = True  # of an older PyTorch, too: nothing changes between the calls here
        measure(arguments.part, arguments.stage, arguments.device, save, arguments.seconds, arguments.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
