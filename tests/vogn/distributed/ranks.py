"""Processes that train one posterior together, and write down what each holds; the tests start them.

python ranks.py FOLDER --steps 4 --processes 2 [--way WAY …] [--rule IVON] [--resume]
torchrun --nproc-per-node 2 ranks.py FOLDER --steps 4 [--die-at STEP]
"""

from __future__ import annotations

import argparse
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, multiprocessing, nn
from torch.utils._pytree import tree_map

import persample
from persample import IVON, VOGN
from persample.testing.devices import generator_of

DATA_SIZE = 40
SHARES = (5, 2, 0, 3)  # samples of each rank in each step; the third has none
WAYS = ("observe", "context", "closure")


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


RULES: dict[str, Any] = {
    "VOGN": partial(VOGN, decay=0.9, momentum=0.8, backend="hooks"),
    "IVON": partial(IVON, betas=(0.8, 0.9)),
}


def make_optimizer(model: nn.Module, rule: str = "VOGN", **options: object) -> Any:
    return RULES[rule](
        model,
        persample.losses.cross_entropy,
        data_size=DATA_SIZE,
        lr=0.05,
        hess_init=0.5,
        mc_samples=2,
        generator=generator_of(11),
        **options,
    )


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = generator_of(100 * step + rank)
    inputs = torch.randn(SHARES[rank], 3, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(2, (SHARES[rank],), generator=generator)


def parts(step: int, rank: int) -> list[tuple[Tensor, Tensor]]:
    """The first rank's batch in two parts."""
    inputs, targets = batch(step, rank)
    return list(zip(inputs.split(3), targets.split(3), strict=True))


def observe(optimizer: Any, step: int, rank: int, way: str = "observe") -> None:
    """Observe the batch of a rank; a closure sees what a block of the user's own would see at each draw."""
    if way == "observe":
        for inputs, targets in parts(step, rank):
            optimizer.observe(inputs, targets)
        return
    for _ in range(optimizer.mc_samples):
        with optimizer.sampled_params(train=True):
            run_passes(optimizer, step, rank)


def run_passes(optimizer: Any, step: int, rank: int) -> None:
    for inputs, targets in parts(step, rank):
        F.cross_entropy(optimizer.model(inputs), targets).backward()


def take_step(optimizer: Any, rank: int, way: str) -> None:
    step = optimizer.steps
    if SHARES[rank] and way == "closure":
        optimizer.step(lambda: run_passes(optimizer, step, rank))
        return
    if SHARES[rank]:
        observe(optimizer, step, rank, way)
    optimizer.step()


def train(rank: int, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    backend = "nccl" if options.gpus else "gloo"
    if options.gpus:  # of which each process has one
        torch.cuda.set_device(rank)
        torch.set_default_device(f"cuda:{rank}")
    if options.processes:
        meeting = f"file://{options.folder}/meeting-{os.getppid()}"
        dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=options.processes)
    else:
        dist.init_process_group(backend)
    held = [train_by(way, rank, options) for way in options.way or WAYS[:1]]
    held = tree_map(lambda value: value.cpu() if isinstance(value, Tensor) else value, held)
    torch.save(held, options.folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def train_by(way: str, rank: int, options: argparse.Namespace) -> list[object]:
    """Train, and return the means after each step, the curvature, and predictions."""
    model = make_model(seed=rank)  # the ranks begin at other weights
    optimizer = make_optimizer(model, options.rule, process_group=dist.group.WORLD)
    checkpoint = options.folder / "checkpoint.pt"
    if options.resume:
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    history = []
    while optimizer.steps < options.steps:
        if options.die_at == optimizer.steps and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        take_step(optimizer, rank, way)
        history.append([p.detach().clone() for p in model.parameters()])
        if rank == 0:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
    name = "curvature" if options.rule == "VOGN" else "hessian"
    curvature = [optimizer.state[p][name] for p in model.parameters()]
    predicted = optimizer.predict(batch(0, 0)[0], samples=3).probabilities
    return [history, curvature, predicted]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--processes", type=int, help="start them here, instead of by torchrun")
    parser.add_argument("--way", choices=WAYS, action="append", help="how to observe; one after the other")
    parser.add_argument("--rule", choices=RULES, default="VOGN")
    parser.add_argument("--gpus", action="store_true", help="over NCCL, with a GPU for each process")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--die-at", type=int)
    options = parser.parse_args()
    if options.processes:  # forked, so that torch is imported once
        multiprocessing.start_processes(train, (options,), options.processes, start_method="fork")
    else:
        train(int(os.environ["RANK"]), options)


if __name__ == "__main__":
    main()
