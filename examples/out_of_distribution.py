"""
Inputs unlike the training data
===============================

Train a convolutional network on MNIST, then ask it about garments (Fashion-MNIST). It should be unsure about them::

    python examples/out_of_distribution.py --data-dir DATA --out out-of-distribution.png

DATA is a folder with MNIST and Fashion-MNIST; without it they are downloaded. Needs
``pip install "persample[experiments]"``.

AUROC is the probability that a garment has a higher score than a digit. After four epochs on all 60,000 digits
(PyTorch 2.13.0, one thread of an AMD EPYC):

==================================================  =====
score                                               AUROC
==================================================  =====
entropy of the prediction at the posterior's mean   0.965
entropy of the prediction averaged over 32 draws    0.965
mutual information between class and weights        0.947
==================================================  =====

.. image:: /images/out-of-distribution.png
   :alt: Histograms of the three scores for digits and garments
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import persample
from persample.experiments import load_dataset, mnist_convnet


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Probability that a score of `outside` is above one of `inside`, equal ones counting one half."""
    scores = torch.cat([inside, outside]).double()
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[place]  # the mean rank of equal scores, from 1
    above = ranks[len(inside) :].sum() - len(outside) * (len(outside) + 1) / 2
    return (above / (len(inside) * len(outside))).item()


def draw_histograms(scores: dict[str, tuple[Tensor, Tensor]], path: Path) -> None:
    """Draw for each way to score how digits and garments are spread."""
    figure, row = plt.subplots(1, len(scores), figsize=(11, 3.8), layout="constrained")
    for axes, (title, (inside, outside)) in zip(row, scores.items(), strict=True):
        bins = torch.linspace(0, torch.cat([inside, outside]).max().item(), 41).tolist()
        for values, label, colour in ((inside, "MNIST", "#0072B2"), (outside, "Fashion-MNIST", "#D55E00")):
            axes.hist(values.tolist(), bins, density=True, alpha=0.6, color=colour, label=label)
        axes.set(title=f"{title}\nAUROC {auroc(inside, outside):.3f}", xlabel="nats", ylabel="density", yscale="log")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train on MNIST, draw the scores of both test sets, and return the area under the ROC curve of each score."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--samples", type=int, default=60_000, help="number of training images")
    parser.add_argument("--test-samples", type=int, default=10_000, help="number of images of each test set")
    parser.add_argument("--out", type=Path, default=Path("out-of-distribution.png"))
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    digits = load_dataset("mnist", options.data_dir)
    garments = load_dataset("fashion-mnist", options.data_dir)
    inputs, targets = digits.train_inputs[: options.samples], digits.train_targets[: options.samples]

    model = mnist_convnet()
    optimizer = persample.VOGN(
        model,
        persample.losses.cross_entropy,
        data_size=len(targets),
        lr=3e-3,
        prior_precision=5.0,
        hess_init=0.01,
        momentum=0.0,
        temperature=1.0,
        backend="fused",
    )
    for epoch in range(options.epochs):
        for rows in torch.randperm(len(targets)).split(128):
            loss = optimizer.observe(inputs[rows], targets[rows])
            optimizer.step()
        print(f"epoch {epoch + 1}: loss of the last batch {loss:.3f}")

    model.eval()
    sets = (digits.test_inputs[: options.test_samples], garments.test_inputs[: options.test_samples])
    inside, outside = (optimizer.predict(images, samples=32, rows_at_once=500) for images in sets)
    scores = {
        "entropy at the mean": tuple(_entropy_at_the_mean(model, images) for images in sets),
        "entropy of the average": (inside.entropy, outside.entropy),
        "mutual information": (inside.mutual_information, outside.mutual_information),
    }
    areas = {title: auroc(*pair) for title, pair in scores.items()}
    for title, area in areas.items():
        print(f"{title:24} AUROC {area:.4f}")
    draw_histograms(scores, options.out)
    print(f"picture: {options.out}")
    return areas


@torch.no_grad()
def _entropy_at_the_mean(model: torch.nn.Module, images: Tensor) -> Tensor:
    probabilities = torch.cat([model(chunk).softmax(1) for chunk in images.split(500)])
    return torch.special.entr(probabilities).sum(1)


if __name__ == "__main__":
    main()

# sphinx_gallery_thumbnail_path = "images/out-of-distribution.png"
