"""The subcommands of `persample`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import persample
from persample.errors import DisagreementError, UnknownBackendError
from persample.experiments import processes
from persample.experiments.australian_credit.command import compare
from persample.experiments.australian_credit.settings import METHODS
from persample.experiments.config import TrainConfig
from persample.experiments.contest.command import HELP as CONTEST_HELP
from persample.experiments.contest.command import contest as run_contest
from persample.experiments.contest.settings import BUDGETS
from persample.experiments.contest.tasks import SEEDS
from persample.experiments.data import DATASET_NAMES
from persample.experiments.model_argument import DTYPES, Asked, ask, require_runs
from persample.experiments.models import MODELS
from persample.experiments.progress import LiveProgress
from persample.experiments.quantity_argument import QUANTITIES, quantities_of
from persample.experiments.recipes import configure
from persample.experiments.reproduction import assist
from persample.experiments.reproduction import reproduce as run_experiment
from persample.experiments.summary import last_records
from persample.experiments.tables import (
    agreement_table,
    australian_table,
    backends_table,
    cost_table,
    results_table,
    summary_table,
)
from persample.files import at_home
from persample.sources.registry import names_side_by_side

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Per-sample gradients in PyTorch, and Bayesian deep learning by VOGN.",
)


DatasetOption = Annotated[str, typer.Option(help=f"The data set: {', '.join(DATASET_NAMES)}.")]
DataDirOption = Annotated[
    Path | None, typer.Option(help="Folder with the data sets' files. [default: $PERSAMPLE_DATA, then a download]")
]
BackendOption = Annotated[
    str | None, typer.Option(help="Source of the per-sample gradients; see 'persample backends'.")
]
EpochsOption = Annotated[int | None, typer.Option(help="Passes over the training data.")]
BatchSizeOption = Annotated[int | None, typer.Option(help="Samples per step.")]
SeedOption = Annotated[int, typer.Option(help="Makes the run repeatable.")]
OutOption = Annotated[Path | None, typer.Option(help="Folder for the results. [default: one in runs/]")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier experiment in --out.")]
ScheduleOption = Annotated[str | None, typer.Option(help="Of the learning rate: constant, or cosine (falls to 0).")]
ValidationOption = Annotated[
    int | None, typer.Option(help="Training samples to hold out and measure in place of the test data.")
]
EvaluateEveryOption = Annotated[int | None, typer.Option(help="Measure every this many epochs, and after the last.")]
TensorboardOption = Annotated[
    bool, typer.Option("--tensorboard", help="Also write metrics and diagnostics for TensorBoard.")
]
_MODEL_HELP = f"{', '.join(MODELS)}; or your own package.module:factory or path/to/file.py:factory."
ModelOption = Annotated[str, typer.Option(help=f"The model: {_MODEL_HELP}", metavar="MODEL")]
ShapeOption = Annotated[
    str | None, typer.Option(help="Shape of one sample, such as 3,32,32, for a batch of random numbers.")
]
ProbeSizeOption = Annotated[
    int | None,
    typer.Option("--batch-size", min=1, help="Samples in a random batch. [default: 128 to time, 16 to check, else 3]"),
]
TokensOption = Annotated[int | None, typer.Option(min=1, help="Make that batch integers below this number.")]
EvalOption = Annotated[bool, typer.Option("--eval", help="Put the model in eval mode first.")]
ProbeBackendsOption = Annotated[
    list[str] | None, typer.Option("--backend", help="A backend; repeat the option for several. [default: all]")
]
QuantityOption = Annotated[
    list[str] | None,
    typer.Option("--quantity", help=f"A quantity; repeat the option for several in one pass: {', '.join(QUANTITIES)}."),
]
DtypeOption = Annotated[
    str | None, typer.Option(help=f"Dtype to compute in: {' or '.join(DTYPES)}. [default: the model's]")
]


@app.command()
def reproduce(
    dataset: DatasetOption = "mnist-5k",
    data_dir: DataDirOption = None,
    backend: BackendOption = None,
    epochs: EpochsOption = None,
    batch_size: BatchSizeOption = None,
    schedule: ScheduleOption = None,
    seed: SeedOption = 0,
    validation: ValidationOption = None,
    evaluate_every: EvaluateEveryOption = None,
    out: OutOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    tensorboard: TensorboardOption = False,
) -> None:
    """Train with Adam and with VOGN, and draw the paper's Figure 2.

    Settings that are not given are those of the data set's recipe.
    """
    shared: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": batch_size,
        "schedule": schedule,
        "seed": seed,
        "validation": validation,
        "evaluate_every": evaluate_every,
    }
    configs = [configure(dataset, "adam", **shared), configure(dataset, "vogn", backend=backend, **shared)]
    _run(configs, out or Path("runs") / dataset, data_dir, resume, overwrite, tensorboard)


@app.command()
def train(
    dataset: DatasetOption = "mnist-5k",
    optimizer: Annotated[str, typer.Option(help="The optimizer: vogn or adam.")] = "vogn",
    data_dir: DataDirOption = None,
    backend: BackendOption = None,
    epochs: EpochsOption = None,
    batch_size: BatchSizeOption = None,
    schedule: ScheduleOption = None,
    seed: SeedOption = 0,
    validation: ValidationOption = None,
    evaluate_every: EvaluateEveryOption = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    prior_precision: Annotated[float | None, typer.Option(help="VOGN: λ of the prior.")] = None,
    decay: Annotated[float | None, typer.Option(help="VOGN: γ of the curvature.")] = None,
    hess_init: Annotated[float | None, typer.Option(help="VOGN: the first curvature s_0.")] = None,
    momentum: Annotated[float | None, typer.Option(help="VOGN: momentum of the gradient.")] = None,
    damping: Annotated[float | None, typer.Option(help="VOGN: a lower bound for the curvature.")] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="VOGN: weight τ of the divergence from the prior; below 1 trusts the data more."),
    ] = None,
    temperature_start: Annotated[float | None, typer.Option(help="VOGN: τ at the first step of a warm-up.")] = None,
    temperature_steps: Annotated[int | None, typer.Option(help="VOGN: steps of the warm-up of τ.")] = None,
    mc_samples: Annotated[int | None, typer.Option(help="VOGN: draws of the weights per batch.")] = None,
    order: Annotated[str | None, typer.Option(help="VOGN: divide by s_t (printed) or s_{t+1} (updated).")] = None,
    train_draws: Annotated[int | None, typer.Option(help="VOGN: draws to predict training data.")] = None,
    test_draws: Annotated[int | None, typer.Option(help="VOGN: draws to predict test or validation data.")] = None,
    out: OutOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    tensorboard: TensorboardOption = False,
) -> None:
    """Train with one optimizer.

    Settings that are not given are those of the data set's recipe.
    """
    config = configure(
        dataset,
        optimizer,
        seed=seed,
        backend=backend,
        epochs=epochs,
        batch_size=batch_size,
        schedule=schedule,
        validation=validation,
        evaluate_every=evaluate_every,
        lr=lr,
        prior_precision=prior_precision,
        decay=decay,
        hess_init=hess_init,
        momentum=momentum,
        damping=damping,
        temperature=temperature,
        temperature_start=temperature_start,
        temperature_steps=temperature_steps,
        mc_samples=mc_samples,
        order=order,
        train_draws=train_draws,
        test_draws=test_draws,
    )
    _run([config], out or Path("runs") / f"{dataset}-{optimizer}", data_dir, resume, overwrite, tensorboard)


@app.command()
def summary(
    folders: Annotated[list[Path], typer.Argument(help="The folders of runs with different seeds.", metavar="FOLDER…")],
) -> None:
    """Show mean and standard deviation over runs that differ in their seeds alone."""
    Console().print(summary_table(last_records([at_home(folder) for folder in folders])))


@app.command()
def australian(
    method: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(METHODS)}; repeat it for several. [default: all]")
    ] = None,
    data_dir: DataDirOption = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each setting, with the seeds 0, 1, …")] = 5,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time. [default: one for each core]")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data; else 16 × batch size.")] = None,
    out: OutOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Compare VOGN, Vadam and mean-field variational inference with their published scores.

    The data are Australian credit data, the model has one hidden layer of 64 ReLUs.
    """
    console = Console()
    scores, path = compare(
        methods=method or METHODS,
        data_dir=data_dir,
        seeds=seeds,
        jobs=jobs,
        epochs=epochs,
        out=out or Path("runs") / "australian",
        resume=resume,
        overwrite=overwrite,
        console=console,
    )
    console.print(australian_table(scores))
    typer.echo(f"Scores: {path}")


@app.command()
def contest(
    dataset: Annotated[list[str] | None, typer.Option(help=CONTEST_HELP["datasets"])] = None,
    data_dir: DataDirOption = None,
    devices: Annotated[str, typer.Option(help=CONTEST_HELP["devices"])] = "cpu:1",
    minutes: Annotated[float, typer.Option(min=0, help=CONTEST_HELP["minutes"])] = math.inf,
    seeds: Annotated[int, typer.Option(min=1, help=CONTEST_HELP["seeds"])] = SEEDS,
    small: Annotated[bool, typer.Option("--small", help=CONTEST_HELP["small"])] = False,
    eager: Annotated[bool, typer.Option("--eager", help=CONTEST_HELP["eager"])] = False,
    out: Annotated[Path, typer.Option(help=CONTEST_HELP["out"])] = Path("runs/contest"),
) -> None:
    """Compare VOGN with other ways to uncertainty, on equal terms: data, epochs, number of trials."""
    tables = run_contest(
        out=out,
        data_dir=data_dir,
        datasets=tuple(dataset or BUDGETS),
        devices=devices,
        minutes=minutes,
        seeds=seeds,
        small=small,
        eager=eager,
    )
    typer.echo(tables)


@app.command()
def crosscheck(
    model: ModelOption = "lenet5",
    shape: ShapeOption = None,
    tokens: TokensOption = None,
    batch_size: ProbeSizeOption = None,
    backend: ProbeBackendsOption = None,
    quantity: QuantityOption = None,
    dtype: DtypeOption = None,
    eval_mode: EvalOption = False,
    seed: SeedOption = 0,
) -> None:
    """Show the error of each backend against a loop over the samples.

    A factory is called without arguments and returns the model; or the model and a batch; or the model, inputs, targets
    and the loss of each sample. A batch by --shape is random. Without a loss, a weighted sum of the outputs stands for
    it. Ends with an error when a backend disagrees; refusing is no disagreement. Quantities are compared beside moments
    and per-sample gradients.
    """
    _require_backends(backend)
    quantities = quantities_of(quantity)
    asked = _asked(model, shape, tokens, batch_size, 16, dtype, eval_mode, seed)
    agreements = persample.crosscheck(*asked.arguments(), backends=backend, quantities=quantities)
    Console().print(agreement_table(agreements, asked.title))
    if wrong := [a.name for a in agreements if a.mean is not None and not a.agrees]:
        raise DisagreementError(f"do not use {', '.join(wrong)} for {model}: the errors are not those of rounding")


@app.command()
def bench(
    model: ModelOption = "lenet5",
    shape: ShapeOption = None,
    tokens: TokensOption = None,
    batch_size: ProbeSizeOption = None,
    backend: ProbeBackendsOption = None,
    quantity: QuantityOption = None,
    dtype: DtypeOption = None,
    eval_mode: EvalOption = False,
    rounds: Annotated[int, typer.Option(min=1, help="How often each backend is timed.")] = 15,
    seed: SeedOption = 0,
) -> None:
    """Show time and peak memory of each backend relative to a plain forward and backward pass.

    Model and batch are those of 'crosscheck'. A backend that disagrees with the loop over the samples is not timed.
    Without --quantity, mean gradient and second moment are timed.
    """
    _require_backends(backend)
    quantities = quantities_of(quantity)
    asked = _asked(model, shape, tokens, batch_size, 128, dtype, eval_mode, seed)
    costs = persample.benchmark(*asked.arguments(), backends=backend, rounds=rounds, quantities=quantities)
    Console().print(cost_table(costs, asked.title, quantity or ()))


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help=_MODEL_HELP, metavar="MODEL")],
    backend: Annotated[
        list[str] | None, typer.Option("--backend", help="A backend; repeat the option for several. [default: fused]")
    ] = None,
    shape: ShapeOption = None,
    tokens: TokensOption = None,
    batch_size: ProbeSizeOption = None,
    dtype: DtypeOption = None,
    eval_mode: EvalOption = False,
    seed: SeedOption = 0,
) -> None:
    """Show what would serve each parameter of a model, what would be refused, and why.

    Model and batch are those of 'crosscheck'. Nothing is computed but forward passes on the batch; without one it goes
    by the modules.
    """
    _require_backends(backend)
    asked = _asked(model, shape, tokens, batch_size, 3, dtype, eval_mode, seed)
    for name in backend or ["fused"]:
        Console().print(persample.explain(asked.model, asked.inputs, asked.targets, asked.loss_fn, backend=name))


@app.command()
def backends() -> None:
    """List the backends and whether they can be used here."""
    Console().print(backends_table(persample.backends().values()))


def _run(
    configs: list[TrainConfig], out: Path, data_dir: Path | None, resume: bool, overwrite: bool, tensorboard: bool
) -> None:
    out = at_home(out)
    with processes.joined():
        if not processes.is_first():
            assist(configs, out, data_dir=data_dir, resume=resume)
            return
        console = Console()
        try:
            with LiveProgress(console) as progress:
                outcome = run_experiment(
                    configs,
                    out,
                    data_dir=data_dir,
                    resume=resume,
                    overwrite=overwrite,
                    watcher=progress,
                    tensorboard=tensorboard,
                )
        except KeyboardInterrupt:
            typer.echo("interrupted; the same command with --resume continues after the last complete epoch", err=True)
            raise
    console.print(results_table(outcome.records))
    typer.echo(f"Figure: {outcome.figure}")


def _require_backends(names: list[str] | None) -> None:
    known = dict.fromkeys([*persample.backends(), *names_side_by_side()])
    if unknown := [name for name in names or () if name not in known]:
        raise UnknownBackendError(f"no backend is called {unknown[0]!r}; choose among {', '.join(known)}")


def _asked(
    model: str,
    shape: str | None,
    tokens: int | None,
    batch_size: int | None,
    default_size: int,
    dtype: str | None,
    eval_mode: bool,
    seed: int,
) -> Asked:
    torch.manual_seed(seed)
    asked = ask(model, shape=shape, tokens=tokens, batch_size=batch_size, default_size=default_size, dtype=dtype)
    asked.model.train(asked.model.training and not eval_mode)
    if asked.inputs is not None:
        require_runs(asked)
    return asked
