"""VOGN as a new user finds it, beside Adam: default settings on small tables.

    python benchmarks/defaults.py [--seeds 3] [--lr 0.02 --temperature 0.15 …]

Three kinds of tables in three classes and a regression whose noise depends on the input, each with 1,000 rows to train
on, 40 epochs, and two networks: 64 ReLUs twice in batches of 32, and 32 tanh twice in batches of 32 or 64. Prints the
log loss on 2,000 further rows: Adam with PyTorch's defaults, VOGN with its own or the given settings, averaged over 32
draws. One seed makes the table, the weights, the order and the noise; several are averaged.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
import persample
from persample import losses

ROWS = 1000
Loss = Callable[[Tensor, Tensor], Tensor]


def tables(seed: int) -> Iterator[tuple[str, Tensor, Tensor, Loss, int]]:
    """Yield the name of each table, its inputs and targets, the loss, and the number of outputs."""
    for name in ("classes of a network", "linear classes", "classes in rings", "regression"):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(ROWS + 2000, 5 if name == "regression" else 10, generator=generator)
        if name == "regression":
            mean = torch.sin(2 * inputs[:, 0]) + inputs[:, 1] * inputs[:, 2] / 2
            scale = 0.1 + 0.4 * torch.sigmoid(2 * inputs[:, 0])
            yield name, inputs, mean + scale * torch.randn(len(inputs), generator=generator), heteroscedastic, 2
            continue
        if name == "classes of a network":
            hidden = (inputs @ torch.randn(10, 16, generator=generator) * 1.5 / 10**0.5).tanh()
            logits = 2 * hidden @ torch.randn(16, 3, generator=generator)
        elif name == "linear classes":
            logits = 4 * inputs @ torch.randn(10, 3, generator=generator) / 10**0.5
        else:
            logits = -8 * (inputs[:, :2].norm(dim=1, keepdim=True) - torch.tensor([0.5, 1.2, 2.0])).square()
        gumbel = -(-torch.rand(logits.shape, generator=generator).log()).log()
        yield name, inputs, (logits + gumbel).argmax(1), losses.cross_entropy, 3


def heteroscedastic(outputs: Tensor, targets: Tensor) -> Tensor:
    """Minus the log-likelihood of a Gaussian, by its mean and the logarithm of its variance."""
    mean, log_variance = outputs.unbind(1)
    return 0.5 * ((targets - mean).square() * (-log_variance).exp() + log_variance + math.log(math.tau))


def trained(
    make: Callable[[nn.Module], torch.optim.Optimizer],
    model: nn.Module,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
    batch_size: int,
) -> torch.optim.Optimizer:
    """Train for 40 epochs, and return the optimizer."""
    optimizer = make(model)
    for _ in range(40):
        for rows in torch.randperm(len(inputs)).split(batch_size):
            if isinstance(optimizer, persample.VOGN):
                optimizer.observe(inputs[rows], targets[rows])
            else:
                optimizer.zero_grad()
                loss(model(inputs[rows]), targets[rows]).mean().backward()
            optimizer.step()
    return optimizer


NETWORKS = ((64, nn.ReLU, 32), (32, nn.Tanh, 32), (32, nn.Tanh, 64))


def log_losses(seed: int, settings: dict[str, float]) -> Iterator[tuple[str, list[float]]]:
    """Yield a title for each table and network, and the log losses of Adam and VOGN."""
    for name, inputs, targets, loss, outputs in tables(seed):
        for width, activation, batch_size in NETWORKS:
            found = []
            for make in (
                lambda model: torch.optim.Adam(model.parameters()),
                lambda model, loss=loss: persample.VOGN(model, loss, data_size=ROWS, **settings),
            ):
                torch.manual_seed(seed)
                layers = [nn.Linear(inputs.shape[1], width), activation(), nn.Linear(width, width), activation()]
                model = nn.Sequential(*layers, nn.Linear(width, outputs))
                optimizer = trained(make, model, loss, inputs[:ROWS], targets[:ROWS], batch_size)
                if isinstance(optimizer, persample.VOGN):
                    posterior = optimizer.posterior
                    likelihoods = posterior.log_likelihoods(loss, inputs[ROWS:], targets[ROWS:], samples=32)
                    found.append(math.log(32) - likelihoods.double().logsumexp(0).mean().item())
                else:
                    with torch.no_grad():
                        found.append(loss(model(inputs[ROWS:]), targets[ROWS:]).mean().item())
            yield f"{name} | 2 × {width} {activation.__name__}, {batch_size}", found


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    for setting in ("lr", "temperature", "prior_precision", "hess_init", "decay", "momentum"):
        parser.add_argument(f"--{setting.replace('_', '-')}", type=float)
    settings = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    seeds = int(settings.pop("seeds"))
    warnings.simplefilter("ignore", persample.vogn.PosteriorWidthWarning)
    torch.set_num_threads(1)
    print("| table | network, batch size | Adam | VOGN |\n|---|---|---|---|")
    for rows in zip(*(log_losses(seed, settings) for seed in range(seeds)), strict=True):
        adam, vogn = (sum(values) / seeds for values in zip(*(found for _, found in rows), strict=True))
        print(f"| {rows[0][0]} | {adam:.3f} | {vogn:.3f} |", flush=True)


if __name__ == "__main__":
    main()
