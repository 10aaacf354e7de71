"""The whole experiment: train one or both optimizers, and record everything about it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import persample
from persample.errors import DataError
from persample.experiments import processes
from persample.experiments.checkpoint import restore
from persample.experiments.config import TrainConfig
from persample.experiments.data import DATASET_TITLES, ImageDataset, hold_out, load_dataset
from persample.experiments.extras import require
from persample.experiments.figures import figure2
from persample.experiments.layers import write_layers_csv
from persample.experiments.models import MODEL_OF_DATASET, MODEL_TITLES
from persample.experiments.records import Record, write_csv
from persample.experiments.run import Run, start
from persample.experiments.run_folder import held, remove, remove_begun, writing
from persample.experiments.seeds import make_generator
from persample.experiments.tensorboard import write_tensorboard
from persample.experiments.train import Watcher, train

_PACKAGES = ("numpy", "backpack-for-pytorch", "opacus")


@dataclass(frozen=True)
class Outcome:
    """The results of an experiment.

    Attributes:
        records: All metrics, optimizer by optimizer.
        figure: The picture.
    """

    records: list[Record]
    figure: Path


def reproduce(
    configs: Sequence[TrainConfig],
    out: Path,
    *,
    data_dir: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    watcher: Watcher | None = None,
    tensorboard: bool = False,
) -> Outcome:
    """Train one run after the other on the same data, and write the results into a folder.

    Of several processes the first one does so, and the others do what `assist` does.

    The folder gets `config.json` (settings, versions, machine), for each optimizer a checkpoint `adam.pt` or
    `vogn.pt` after every epoch, `metrics.csv`, `diagnostics.csv` (of the posterior) and `figure2.png`.

    Args:
        configs: The runs, with different optimizers on one data set, of which the same samples are held out.
        out: The folder to write to; it is made.
        data_dir: See `load_dataset`.
        resume: Go on where the experiment in `out` was interrupted.
        overwrite: Replace what an earlier experiment left in `out`, which is refused otherwise.
        watcher: Is told of every batch and epoch.
        tensorboard: Write metrics and diagnostics for TensorBoard too, into the folder `tensorboard`.

    Returns:
        The metrics and the picture.

    Raises:
        MissingPackageError: A package of the extra `experiments` is not installed.
        DataError: `out` holds another experiment, another command writes to it, or it cannot be written to.
        PersampleError: Data, settings or training fail; see `load_dataset` and `train`.
    """
    for package in ("matplotlib", *(["tensorboard"] if tensorboard else [])):
        require(package, "The experiment")  # now rather than after hours of training
    checkpoints = [out / f"{config.optimizer}.pt" for config in configs]
    if resume and not any(path.exists() for path in checkpoints):
        raise DataError(f"there is no run to resume in {out}; start one without --resume")
    with held(out):
        old = [path for path in _results(out) if path.exists()]
        _refuse_mixture(old, checkpoints, out, resume=resume, overwrite=overwrite)
        dataset = _load(configs[0], data_dir)
        processes.wait_for_all()  # now the others find the data, perhaps downloaded, and nobody writes checkpoints
        runs = _start(configs, checkpoints, dataset, resume)
        if not resume:
            remove(old)
        remove_begun([*_results(out), out / "config.json", out / "partial"])
        return _train_and_tell(runs, checkpoints, dataset, out, watcher, tensorboard=tensorboard)


def _results(out: Path) -> list[Path]:
    """The files of an experiment."""
    return [out / name for name in ("adam.pt", "vogn.pt", "metrics.csv", "diagnostics.csv", "figure2.png")]


def _refuse_mixture(
    old: Sequence[Path], checkpoints: Sequence[Path], out: Path, *, resume: bool, overwrite: bool
) -> None:
    """Raise if the existing files `old` in `out` would stay beside results of other runs."""
    if old and not (resume or overwrite):
        raise DataError(
            f"{out} holds an earlier experiment ({', '.join(path.name for path in old)}): continue it (--resume), "
            "replace it (--overwrite), or choose another folder (--out)"
        )
    others = [path.name for path in old if path.suffix == ".pt" and path not in checkpoints]
    if others and resume:
        raise DataError(
            f"{out} also holds {others[0]}, from an experiment with both optimizers: continue that one ('persample "
            "reproduce --resume'), or choose another folder (--out)"
        )


def _train_and_tell(
    runs: Sequence[Run],
    checkpoints: Sequence[Path],
    dataset: ImageDataset,
    out: Path,
    watcher: Watcher | None,
    *,
    tensorboard: bool,
) -> Outcome:
    configs = [run.config for run in runs]
    _write_json(describe(configs), out / "config.json")
    for run, checkpoint in zip(runs, checkpoints, strict=True):
        train(run, dataset, checkpoint, watcher)
    records = [record for run in runs for record in run.records]
    write_csv(records, out / "metrics.csv")
    if layers := [layer for run in runs for layer in run.layers]:
        write_layers_csv(layers, out / "diagnostics.csv")
    if tensorboard:
        write_tensorboard(records, layers, out / "tensorboard")
    figure = out / "figure2.png"
    figure2(records, figure, _title(configs))
    return Outcome(records, figure)


def assist(configs: Sequence[TrainConfig], out: Path, *, data_dir: Path | None = None, resume: bool = False) -> None:
    """Train along with the first process, without writing anything. Arguments as for `reproduce`."""
    processes.wait_for_all()
    checkpoints = [out / f"{config.optimizer}.pt" for config in configs]
    dataset = _load(configs[0], data_dir)
    for run, checkpoint in zip(_start(configs, checkpoints, dataset, resume), checkpoints, strict=True):
        train(run, dataset, checkpoint)


def _load(config: TrainConfig, data_dir: Path | None) -> ImageDataset:
    """Load the data, and hold out samples as configured: the same for all runs with this seed."""
    dataset = load_dataset(config.dataset, data_dir)
    return hold_out(dataset, config.validation, make_generator(config.seed, "validation"))


def _start(
    configs: Sequence[TrainConfig], checkpoints: Sequence[Path], dataset: ImageDataset, resume: bool
) -> list[Run]:
    """Begin or resume all runs; no process writes before all have read."""
    runs = [start(config, len(dataset.train_targets)) for config in configs]
    for run, checkpoint in zip(runs, checkpoints, strict=True):
        if resume and checkpoint.exists():
            restore(run, checkpoint)
    processes.wait_for_all()
    return runs


def describe(configs: Sequence[TrainConfig]) -> dict[str, Any]:
    """Return the settings of the runs, the versions of the packages and the machine, for a JSON file."""
    return {
        "runs": [config.as_dict() for config in configs],
        "versions": {"python": platform.python_version()} | _versions(),
        "machine": {
            "platform": platform.platform(),
            "processor": platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "processes": processes.count(),
        },
    }


def _versions() -> dict[str, str]:
    # As these two say it: metadata lack the build of PyTorch (+cpu, +cu130), and there are none for sources on a path.
    installed = {"persample": persample.__version__, "torch": str(torch.__version__)}
    for package in _PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def _write_json(content: dict[str, Any], path: Path) -> None:
    with writing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _title(configs: Sequence[TrainConfig]) -> str:
    dataset = configs[0].dataset
    optimizers = " and ".join({"adam": "Adam", "vogn": "VOGN"}[config.optimizer] for config in configs)
    return f"{optimizers}: {MODEL_TITLES[MODEL_OF_DATASET[dataset]]} on {DATASET_TITLES[dataset]}"
