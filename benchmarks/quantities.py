"""Time of quantities of the single gradients with `fused` and `hooks`, and of the peers that have them.

    pip install ".[opacus,backpack]" torchjd --group benchmarks
    python benchmarks/quantities.py --out runs/quantities
    python benchmarks/quantities.py --out runs/quantities --models ResNet-20    # one column anew

Each quantity is timed over an ordinary forward and backward pass; all take turns within one process for each model,
until the time for each is used up. BackPACK's `BatchL2Grad` gives norms, Opacus' fast gradient clipping a clipped sum,
with both of its backward passes; TorchJD's `autogram` a Gram matrix; where one is not installed, fails or gives other
norms than a loop, the table says so. Peak memory includes parameters and batch. `fused` replays the step that it has
recorded, as it does after some calls; "fused, eager" computes as in the first calls.

Writes `quantities.md`, first the tables of docs/howto/quantities.md, then those of all sources; `quantities.png`, the
picture there (docs/images); and `quantities.json`. What the folder holds of other models stays.
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
    "fused": ("fused", {"compile": True}),
    "fused, eager": ("fused", {"compile": False}),
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
FEWEST = 3  # rounds of what is slow
SLOW = 1.0  # seconds of a call from which on it is not run once more before it is timed


def measure(name: str, batch: int, rounds: int, budget: float) -> dict[str, Any]:
    """Return ratios of time and memory for one model."""
    warnings.simplefilter("ignore")
    model, x, y = problem(name, batch)
    loss_fn = persample.losses.cross_entropy
    plain = plain_pass(model, loss_fn, x, y)
    plain()
    start = clock()
    due = persample.make_source("fused", model, loss_fn).norms(x, y)
    first = clock() - start
    calls: dict[str, Callable[[], Any]] = {}
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
            found = call().detach()
        except ImportError:
            left_out[peer] = "not installed"
        except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError) as error:
            left_out[peer] = f"fails: {type(error).__name__}, {str(error).splitlines()[0][:150]}"
        else:
            if torch.allclose(found, due, rtol=1e-3):
                calls[peer] = call
            else:
                left_out[peer] = f"wrong: norms differ by a factor of up to {float((found / due).max()):.2f}"
    seconds, ratios = timed(plain, calls, rounds, budget)
    resident = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), x, y))
    of_plain = resident + peak_memory(plain, x.device)
    memory = {each: (resident + peak_memory(call, x.device)) / of_plain for each, call in calls.items()}
    return {
        "model": name, "batch": batch, "plain_seconds": seconds, "ratios": ratios, "memory": memory,
        "first_call": first / seconds, "left_out": left_out,
    }  # fmt: skip


def timed(
    plain: Callable[[], Any], calls: dict[str, Callable[[], Any]], rounds: int, budget: float
) -> tuple[float, dict[str, float]]:
    """Return the median time of `plain`, and for each of the calls the median over that of the same round.

    Args:
        plain: the ordinary pass.
        calls: what takes turns with it.
        rounds: how often each is timed at most.
        budget: the seconds for each; after that, and some rounds, it is timed no more.
    """
    seconds: list[float] = []
    ratios: dict[str, list[float]] = {each: [] for each in calls}
    spent = dict.fromkeys(calls, 0.0)
    for round_number in range(rounds + 1):  # the first is a warm-up
        own = _seconds(plain)
        seconds.append(own)
        for each, call in calls.items():
            if spent[each] < budget or len(ratios[each]) <= FEWEST:
                start = clock()
                ratios[each].append(_seconds(call) / own)
                spent[each] += clock() - start
        if not any(len(found) > round_number for found in ratios.values()):
            break
    return statistics.median(seconds[1:]), {each: statistics.median(found[1:]) for each, found in ratios.items()}


def _seconds(call: Callable[[], Any]) -> float:
    for _ in range(2):  # the first finds the caches that another one left
        start = clock()
        call()
        took = clock() - start
        if took > SLOW:
            break
    return took


def clock() -> float:
    """Return the time: on one thread its own, which counts whatever else the machine does."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def table(results: list[dict[str, Any]], what: str, rows: dict[str, str]) -> str:
    """Return ratios of time or of memory as a Markdown table; `rows` has for each what it is called there."""
    lines = ["| quantity | " + " | ".join(f"{r['model']} ({r['batch']})" for r in results) + " |"]
    lines.append("|---" * (len(results) + 1) + "|")
    for row, label in rows.items():
        lines.append(f"| {label} | " + " | ".join(_cell(r, what, row) for r in results) + " |")
    return "\n".join(lines) + "\n"


def _cell(result: dict[str, Any], what: str, row: str) -> str:
    if row in result[what]:
        return f"{result[what][row]:.2f}"
    return str(result["left_out"].get(row, "–")).partition(":")[0]


#: The rows of the documentation: `fused`, and below each quantity the peer that has it.
IN_DOCS = {
    "fused: moments": "moments, `fused`",
    "fused: norms": "norms, `fused`",
    "BackPACK: norms": "norms, BackPACK's `BatchL2Grad`",
    "fused: clipped sum": "clipped sum, `fused`",
    "Opacus: clipped sum": "clipped sum, Opacus' ghost clipping, both backward passes",
    "fused: Gram": "Gram matrix, `fused`",
    "TorchJD: Gram": "Gram matrix, TorchJD's `autogram`",
    "fused: moments, norms and noise scale": "moments, norms and noise scale, `fused`",
    "fused, eager: moments": "moments, `fused` in its first calls",
    "fused, eager: moments, norms and noise scale": "moments, norms and noise scale, `fused` in its first calls",
}


def written(results: list[dict[str, Any]]) -> str:
    """Return all tables, those of the documentation first."""
    every = {row: row for result in results for row in result["ratios"]} | {peer: peer for peer in PEERS}
    reasons = [
        f"- {peer}, {result['model']}: {reason}" for result in results for peer, reason in result["left_out"].items()
    ]
    firsts = [f"- {r['model']}: {r['first_call']:.0f} ({1e3 * r['plain_seconds']:.1f} ms)" for r in results]
    return "\n".join([
        f"Time over an ordinary pass:\n\n{table(results, 'ratios', IN_DOCS)}",
        f"Peak memory over that of an ordinary pass:\n\n{table(results, 'memory', IN_DOCS)}",
        *["Without a figure:\n", *reasons, ""],
        *["First call of norms, with the self-check, over an ordinary pass (which takes):\n", *firsts],
        f"\nTime, all sources:\n\n{table(results, 'ratios', every)}",
        f"Memory, all sources:\n\n{table(results, 'memory', every)}",
    ])  # fmt: skip


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
                    word = _cell(result, "ratios", row).replace("–", "refused")
                    axes.text(where, 0.05, word, rotation=90, ha="center", va="bottom", fontsize=7, color="0.5")
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
    rounds: Annotated[int, typer.Option(help="How often each is timed at most.")] = 15,
    budget: Annotated[float, typer.Option(help="Seconds for each quantity of each source and model.")] = 4.0,
) -> None:
    """Measure all quantities on all models."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "quantities.json"
    known = json.loads(file.read_text())["results"] if file.exists() else []
    found = {result["model"]: result for result in known}
    for name in models.split(";"):
        start = time.perf_counter()
        found[name] = in_fresh_process(measure, name, MODELS[name], rounds, budget)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        results = [found[model] for model in MODELS if model in found]
        peers = [name for name in ("backpack-for-pytorch", "opacus", "torchjd") if _is_installed(name)]
        report = {"machine": machine(*peers), "results": results}
        with replacing(file) as new:
            new.write_text(json.dumps(report, indent=2) + "\n")
        with replacing(out / "quantities.md") as new:
            new.write_text(written(results))
        with replacing(out / "quantities.png") as new:
            draw(results, new)
    print(written(results))


if __name__ == "__main__":
    typer.run(main)
