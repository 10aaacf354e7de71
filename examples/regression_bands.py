"""
A curve with bands of uncertainty
=================================

The dark band is the uncertainty of the curve: how far the draws of the weights differ. The light band adds the noise of
the observations. Outside the data both widen::

    python examples/regression_bands.py --out regression.png

Needs matplotlib: ``pip install "persample[experiments]"``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import persample
from persample.vogn import GaussianPrediction

NOISE_PRECISION = 100.0  # 1 / variance of the observations' noise


def observations() -> tuple[Tensor, Tensor]:
    """Return 150 points of a curve with noise, two tensors (150, 1)."""
    x = torch.linspace(-3, 3, 150)[:, None]
    return x, x * torch.sin(1.3 * x) / 2 + torch.randn(x.shape) / NOISE_PRECISION**0.5


def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
    """Minus log-likelihood of a Gaussian with known noise."""
    return persample.losses.gaussian(outputs, targets, noise_precision=NOISE_PRECISION)


def draw_bands(x: Tensor, predicted: GaussianPrediction, data: tuple[Tensor, Tensor], path: Path) -> None:
    """Draw the data, the mean, and two standard deviations of the curve and of new observations."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    grid, mean = x.flatten().numpy(), predicted.mean.flatten().numpy()
    bands = {"a new observation": predicted.variance, "the curve": predicted.epistemic_variance}
    for (label, variance), colour in zip(bands.items(), ("#CFE4F2", "#56B4E9"), strict=True):
        width = 2 * variance.sqrt().flatten().numpy()
        axes.fill_between(grid, mean - width, mean + width, color=colour, label=f"± 2σ of {label}", linewidth=0)
    axes.plot(grid, mean, color="#0072B2", label="mean over the posterior")
    axes.plot(*(part.flatten().numpy() for part in data), ".", color="black", label="data")
    axes.set(xlabel="x", ylabel="y", title="VOGN: outside the data the curve is uncertain")
    axes.legend(loc="lower center", frameon=False)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> GaussianPrediction:
    """Train, draw, and return what is predicted on a grid."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--out", type=Path, default=Path("regression.png"))
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    x, y = observations()
    model = nn.Sequential(nn.Linear(1, 50), nn.ReLU(), nn.Linear(50, 1))
    optimizer = persample.VOGN(
        model,
        loss_fn,
        data_size=len(x),
        lr=0.05,
        prior_precision=1.0,
        hess_init=10.0,
        decay=0.99,
        momentum=0.9,
        temperature=1.0,
        mc_samples=2,
        backend="fused",
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for step in range(options.steps):
        loss = optimizer.observe(x, y)
        optimizer.step()
        scheduler.step()
        if (step + 1) % 1000 == 0:
            print(f"step {step + 1}: loss {loss:.3f}, ELBO per sample {optimizer.elbo(x, y).per_sample:.3f} nats")

    grid = torch.linspace(-4.5, 4.5, 361)[:, None]
    predicted = optimizer.predict_gaussian(grid, noise_precision=NOISE_PRECISION, samples=200)
    draw_bands(grid, predicted, (x, y), options.out)
    print(f"picture: {options.out}")
    return predicted


if __name__ == "__main__":
    main()
