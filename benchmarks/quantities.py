"""Time of quantities of the single gradients with `fused` and `hooks`, and of the peers that have them.

    pip install ".[opacus,backpack]" --group benchmarks
    python benchmarks/quantities.py --out runs/quantities

Each quantity is timed over an ordinary forward and backward pass; all take turns within one process for each model.
BackPACK's `BatchL2Grad` gives norms, Opacus' fast gradient clipping a clipped sum, with both of its backward passes;
TorchJD's `autogram` a Gram matrix; these are left out where they are not installed, refuse the model or give other
norms than a loop. Writes `quantities.json`, `quantities.md` and `quantities.png`; what the folder holds of other models
stays.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor, nn

import persample
from persample.checks.benchmark import plain_pass
from persample.checks.memory import peak_memory
from persample.files import replacing
from persample.quantities import Gram, Mean, Norms, SecondMoment, WeightedSum, clipping

sys.path.insert(0, str(Path(__file__).parent))
from gradients import in_fresh_process, machine, problem

MODELS = {"LeNet-5": 128, "MLP": 128, "Transformer": 32, "ResNet-20": 128}
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "fused": ("fused", {}),
    "fused, compile=True": ("fused", {"compile": True}),
    "hooks": ("hooks", {}),
}
LIMIT = 1.0  # of the norms, in clipped sums


def ours(source: persample.PerSampleGradSource, x: Tensor, y: Tensor) -> dict[str, Callable[[], Any]]:
    """Return what is timed of a source."""
    return {
        "moments": lambda: source.moments(x, y),
        "norms": lambda: source.compute(x, y, Norms()),
        "clipped sum": lambda: source.compute(x, y, WeightedSum(clipping(LIMIT))),
        "Gram": lambda: source.compute(x, y, Gram()),
        "moments, norms and noise scale": lambda: together(source, x, y),
    }


def together(source: persample.PerSampleGradSource, x: Tensor, y: Tensor) -> float:
    """Take moments and norms from one pass, and the noise scale from the moments."""
    several = source.compute(x, y, Mean(), SecondMoment(), Norms())
    return persample.Moments(several.losses, several.mean, several.second_moment).noise_scale()


def backpack_norms(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """Return the norms by BackPACK's `BatchL2Grad`."""
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    extended = extend(copy.deepcopy(model))
    loss_fn = extend(nn.CrossEntropyLoss(reduction="sum"))

    def norms() -> Tensor:
        extended.zero_grad()
        with backpack(BatchL2Grad()):
            loss_fn(extended(x), y).backward()
        return torch.stack([p.batch_l2 for p in extended.parameters()]).sum(0).sqrt()  # type: ignore[attr-defined]

    return norms


def opacus_clipped(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """Return the norms of a clipped sum by Opacus' fast gradient clipping, after both of its backward passes."""
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        copy.deepcopy(model), max_grad_norm=LIMIT, use_ghost_clipping=True, loss_reduction="sum", strict=True
    )

    def clipped() -> Tensor:
        wrapped.zero_grad()
        losses = nn.functional.cross_entropy(wrapped(x), y, reduction="none")
        wrapped.enable_hooks()
        losses.sum().backward(retain_graph=True)
        weights, norms = wrapped.get_clipping_coef(), wrapped.get_norm_sample()
        wrapped.zero_grad()
        wrapped.disable_hooks()
        (weights * losses).sum().backward()
        wrapped.enable_hooks()
        return norms  # type: ignore[no-any-return]

    return clipped


def torchjd_gram(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """Return the norms, on the diagonal of the Gram matrix by TorchJD's autogram."""
    from torchjd.autogram import Engine

    copied = copy.deepcopy(model)
    engine = Engine(copied, batch_dim=0)

    def gram() -> Tensor:
        losses = nn.functional.cross_entropy(copied(x), y, reduction="none")
        return engine.compute_gramian(losses).diagonal().sqrt()

    return gram


PEERS = {"BackPACK: norms": backpack_norms, "Opacus: clipped sum": opacus_clipped, "TorchJD: Gram": torchjd_gram}


def measure(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """Return seconds and ratios for one model."""
    warnings.simplefilter("ignore")
    model, x, y = problem(name, batch)
    loss_fn = persample.losses.cross_entropy
    due = persample.make_source("fused", model, loss_fn).norms(x, y)
    calls: dict[str, Callable[[], Any]] = {"plain": plain_pass(model, loss_fn, x, y)}
    for name_of, (backend, options) in SOURCES.items():
        try:
            persample.make_source(backend, model, loss_fn).norms(x, y)
        except persample.PersampleError:
            continue
        source = persample.make_source(backend, model, loss_fn, check="never", **options)
        calls |= {f"{name_of}: {what}": call for what, call in ours(source, x, y).items()}
    left_out = {}
    for peer, make in PEERS.items():
        try:
            call = make(model, x, y)
            call()
            found = call().detach()
        except (
            ImportError,
            RuntimeError,
            NotImplementedError,
            ValueError,
            TypeError,
            AttributeError,
        ) as error:  # it refuses
            left_out[peer] = str(error).splitlines()[0][:200]
            continue
        if torch.allclose(found, due, rtol=1e-3):
            calls[peer] = call
        else:
            left_out[peer] = f"other norms, by a factor of up to {float((found / due).max()):.2f}"
    # On one thread its own time counts, whatever else the machine does.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {each: [] for each in calls}
    for round_number in range(rounds + 1):
        for each, call in calls.items():
            call()
            start = clock()
            call()
            if round_number:
                seconds[each].append(clock() - start)
    ratios = {
        each: statistics.median(own / plain for own, plain in zip(found, seconds["plain"], strict=True))
        for each, found in seconds.items()
    }
    peaks = {each: peak_memory(call, torch.device("cpu")) for each, call in calls.items()}
    memory = {each: peak / peaks["plain"] for each, peak in peaks.items()}
    return {"model": name, "batch": batch, "ratios": ratios, "memory": memory, "left_out": left_out}


def table(results: list[dict[str, Any]], what: str = "ratios") -> str:
    """Return the ratios, of time or of memory, as a Markdown table."""
    rows = dict.fromkeys(each for result in results for each in result[what] if each != "plain")
    rows |= dict.fromkeys(PEERS)
    lines = ["| quantity | " + " | ".join(f"{r['model']} ({r['batch']})" for r in results) + " |"]
    lines.append("|---" * (len(results) + 1) + "|")
    for row in rows:
        cells = [f"{r[what][row]:.2f}" if row in r[what] else "–" for r in results]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


#: What is to be reached, by quantity and model; all together may take a tenth of a plain pass more than moments.
LIMITS = {
    "norms": {"LeNet-5": 1.25, "MLP": 1.15, "Transformer": 1.4, "ResNet-20": 1.4},
    "clipped sum": {"LeNet-5": 1.5, "MLP": 1.4, "Transformer": 1.6, "ResNet-20": 1.6},
    "Gram": {"LeNet-5": 1.6, "MLP": 1.3, "Transformer": 1.8, "ResNet-20": 1.8},
    "moments, norms and noise scale": {},
}
HIGHEST = 5.0  # ratio that a bar shows; a number beside it tells of more


def draw(results: list[dict[str, Any]], path: Any) -> None:
    """Draw the ratios: a panel for each quantity, bars for each model, and a line where the limit is."""
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    colours = dict(zip([*SOURCES, "peer"], ("#0072B2", "#56B4E9", "#009E73", "#D55E00"), strict=True))
    for axes, (quantity, limits) in zip(figure.subplots(2, 2).flat, LIMITS.items(), strict=True):
        peer = next((peer for peer in PEERS if peer.endswith(f": {quantity}")), None)
        rows = {source: f"{source}: {quantity}" for source in SOURCES} | ({"peer": peer} if peer else {})
        for place, result in enumerate(results):
            ratios, width = result["ratios"], 0.8 / len(rows)
            for number, (label, row) in enumerate(rows.items()):
                where = place + (number - (len(rows) - 1) / 2) * width
                ratio = ratios.get(row)
                if ratio is None:
                    axes.text(where, 0.05, "none", rotation=90, ha="center", va="bottom", fontsize=7, color="0.5")
                    continue
                axes.bar(where, min(ratio, HIGHEST), width, color=colours[label])
                shown = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"
                axes.text(where, min(ratio, HIGHEST - 0.3) + 0.04, shown, ha="center", va="bottom", fontsize=7)
            limit = limits.get(result["model"], ratios.get("fused: moments", 0.0) + 0.1)
            axes.hlines(limit, place - 0.45, place + 0.45, color="black", linewidth=1, linestyle="--")
        axes.set_xticks(range(len(results)), [f"{r['model']} ({r['batch']})" for r in results])
        axes.set(title=quantity if peer is None else f"{quantity}; peer: {peer.partition(':')[0]}", ylim=(0, HIGHEST))
        axes.axhline(1, color="0.7", linewidth=0.8, zorder=0)
    figure.supylabel("time over an ordinary forward and backward pass")
    handles = [Patch(color=colour, label=label) for label, colour in colours.items()]
    handles.append(Line2D([], [], color="black", linewidth=1, linestyle="--", label="to be reached by fused"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=120, format="png")


def _is_installed(distribution: str) -> bool:
    return any(metadata.distributions(name=distribution))


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/quantities"),
    models: Annotated[str, typer.Option(help="Names of models, separated by semicolons.")] = ";".join(MODELS),
    rounds: Annotated[int, typer.Option(help="How often each is timed.")] = 15,
) -> None:
    """Measure all quantities on all models."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "quantities.json"
    known = json.loads(file.read_text())["results"] if file.exists() else []
    found = {result["model"]: result for result in known}
    for name in models.split(";"):
        result = found[name] = in_fresh_process(measure, name, MODELS[name], rounds)
        print(table([result]), table([result], "memory"), result["left_out"], flush=True)
        results = [found[model] for model in MODELS if model in found]
        peers = [name for name in ("backpack-for-pytorch", "opacus", "torchjd") if _is_installed(name)]
        report = {"machine": machine(*peers), "results": results}
        with replacing(file) as new:
            new.write_text(json.dumps(report, indent=2) + "\n")
        with replacing(out / "quantities.md") as new:
            new.write_text(f"Time:\n\n{table(results)}\nMemory:\n\n{table(results, 'memory')}")
        with replacing(out / "quantities.png") as new:
            draw(results, new)


if __name__ == "__main__":
    typer.run(main)
