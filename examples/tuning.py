"""
What wrong settings look like
=============================

Train small networks with VOGN by good and by wrong settings, and draw how each failure shows::

    python examples/tuning.py --out runs/tuning

It takes about two minutes. Needs ``pip install "persample[experiments]"``. What to do in each case:
:doc:`the tuning page </howto/tuning>`.

.. image:: /images/tuning-learning-rate.png
   :alt: Training and test log loss over the epochs for three learning rates
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

import persample
from persample import losses, metrics

# Of Okabe and Ito, told apart with every kind of colour vision.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
CHANCE = math.log(3)


def table(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return random rows of ten features, and their classes: a noisy choice of a fixed random network."""
    fixed = torch.Generator().manual_seed(12)
    teacher = torch.randn(10, 16, generator=fixed) / 2, 2 * torch.randn(16, 3, generator=fixed)
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, 10, generator=generator)
    noise = -torch.rand(rows, 3, generator=generator).log()  # whose negative logarithm is Gumbel's noise
    return inputs, ((inputs @ teacher[0]).tanh() @ teacher[1] - noise.log()).argmax(1)


class Course(NamedTuple):
    """What a training showed: the loss of each step, log losses after each epoch, and the posterior at the end."""

    steps: list[float]
    train: list[float]
    test: list[float]
    posterior: persample.Posterior


def train(epochs: int, rows: int = 1000, **settings: float) -> Course:
    """Train on the table with these settings of VOGN in place of the defaults."""
    torch.manual_seed(0)
    (inputs, targets), (test_inputs, test_targets) = table(rows, seed=1), table(2000, seed=2)
    model = nn.Sequential(nn.Linear(10, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 3))
    optimizer = persample.VOGN(model, losses.cross_entropy, **{"data_size": len(inputs), **settings})
    steps, train_losses, test_losses = [], [], []
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs)).split(32):
            steps.append(optimizer.observe(inputs[batch], targets[batch]).item())
            optimizer.step()
        for values, (x, y) in ((train_losses, (inputs, targets)), (test_losses, (test_inputs, test_targets))):
            values.append(metrics.log_loss(optimizer.predict(x, samples=8).probabilities, y))
    return Course(steps, train_losses, test_losses, optimizer.posterior)


def draw_courses(path: Path, title: str, courses: Mapping[str, tuple[Course, str]]) -> None:
    """Draw log losses over the epochs, on the training data to the left, on test data to the right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    for label, (course, colour) in courses.items():
        for axes, values in ((left, course.train), (right, course.test)):
            axes.plot(range(1, len(values) + 1), values, color=colour, label=label, linewidth=2)
    for axes, heading in ((left, "training data"), (right, "test data")):
        finish(axes, f"Log loss on {heading}", "epoch")
    left.set_ylim(0, 1.6)
    right.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def finish(axes: Axes, title: str, xlabel: str) -> None:
    """Give the axes their title, a grid, and the log loss of someone who knows nothing."""
    axes.axhline(CHANCE, color="grey", linestyle=":", linewidth=1)
    axes.annotate("guessing", (0.01, CHANCE), (0, 9), xycoords=("axes fraction", "data"), textcoords="offset points")
    axes.set(title=title, xlabel=xlabel)
    axes.grid(alpha=0.3)


def learning_rate(path: Path, epochs: int) -> dict[str, Course]:
    """Too low: the losses still fall at the end. Too high: they jump, or never fall."""
    courses = {f"lr = {lr:g}": train(epochs, lr=lr) for lr in (3e-4, 1e-2, 0.3)}
    labelled = zip(courses.items(), (GREEN, BLUE, ORANGE), ("too low", "default", "too high"), strict=True)
    draw_courses(path, "Learning rate", {f"{name}, {what}": (course, c) for (name, course), c, what in labelled})
    return courses


def temperature(path: Path, epochs: int) -> dict[str, Course]:
    """Too low: the test loss rises while the training loss falls. Too high: both stay at guessing."""
    courses = {f"temperature = {value:g}": train(epochs, temperature=value) for value in (0.003, 0.3, 10.0)}
    labelled = zip(courses.items(), (ORANGE, BLUE, GREEN), ("too low", "default", "too high"), strict=True)
    draw_courses(path, "Temperature", {f"{name}, {what}": (course, c) for (name, course), c, what in labelled})
    return courses


def prior(path: Path, epochs: int) -> dict[str, Course]:
    """Too low: slightly more overfitting. Too high: all weights are pulled to 0."""
    courses = {f"prior_precision = {value:g}": train(epochs, prior_precision=value) for value in (0.05, 5.0, 1000.0)}
    labelled = zip(courses.items(), (ORANGE, BLUE, GREEN), ("too low", "default", "too high"), strict=True)
    draw_courses(path, "Prior precision", {f"{name}, {what}": (course, c) for (name, course), c, what in labelled})
    return courses


def data_size(path: Path, epochs: int) -> dict[str, Course]:
    """The size of the batch in place of that of the data: the prior outweighs the data."""
    courses = {f"data_size = {size}": train(epochs, data_size=size) for size in (32, 1000)}
    labelled = zip(courses.items(), (ORANGE, BLUE), ("the batch size", "all rows"), strict=True)
    draw_courses(path, "Data size", {f"{name}, {what}": (course, c) for (name, course), c, what in labelled})
    return courses


def draws(path: Path, epochs: int, repeats: int = 10) -> dict[int, list[float]]:
    """Few draws: predictions change from call to call, and are worse on average."""
    course = train(epochs)
    inputs, targets = table(2000, seed=2)
    found = {
        number: [
            metrics.log_loss(course.posterior.predict(inputs, samples=number).probabilities, targets)
            for _ in range(repeats)
        ]
        for number in (1, 2, 4, 8, 16, 32, 64)
    }
    assert course.posterior.model is not None
    with torch.no_grad():
        at_mean = losses.cross_entropy(course.posterior.model(inputs), targets).mean().item()
    figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for number, values in found.items():
        axes.plot([number] * len(values), values, ".", color=BLUE, alpha=0.5)
    axes.plot(list(found), [sum(values) / len(values) for values in found.values()], color=BLUE, label="averaged")
    axes.axhline(at_mean, color=ORANGE, linestyle="--", label="at the posterior's mean")
    axes.set(title="Draws per prediction: ten predictions each", xlabel="samples", ylabel="test log loss", xscale="log")
    axes.set_xticks(list(found), [str(number) for number in found])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return found


def first_curvature(path: Path, epochs: int) -> dict[str, Course]:
    """Too small: the first steps throw the weights far away, and the losses of the first steps explode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", persample.vogn.DangerousFirstStepWarning)  # which says so, too
        courses = {
            f"hess_init = {value:g}": train(epochs, hess_init=value, prior_precision=1.0) for value in (0.0, 0.1, 10.0)
        }
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for (label, course), colour in zip(courses.items(), (ORANGE, BLUE, GREEN), strict=True):
        left.plot(course.steps[:64], color=colour, label=label)
        right.plot(range(1, len(course.test) + 1), course.test, color=colour, linewidth=2)
    finish(left, "Loss of the first 64 steps", "step")
    finish(right, "Log loss on test data", "epoch")
    left.set_yscale("log")
    right.set_yscale("log")
    left.legend(frameon=False)
    figure.suptitle("Initial curvature")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return courses


PICTURES = (learning_rate, temperature, prior, data_size, draws, first_curvature)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw all pictures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("runs/tuning"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for picture in PICTURES:
        path = options.out / f"tuning-{picture.__name__.replace('_', '-')}.png"
        picture(path, options.epochs)
        print(f"{path}: {picture.__doc__}")


if __name__ == "__main__":
    main()
