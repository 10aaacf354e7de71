"""Running one task: train, or start from a trained network, and measure."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from persample import Ensemble, Posterior, metrics
from persample.errors import NonFiniteLossError, PersampleError
from persample.experiments.contest.course import Course, on_device
from persample.experiments.contest.data import load
from persample.experiments.contest.methods import METHODS, Predictor, Training
from persample.experiments.contest.settings import TRIALS, Budget
from persample.experiments.contest.tasks import Result, Task
from persample.experiments.data import ImageDataset, hold_out
from persample.experiments.seeds import derive_seed, make_generator
from persample.vogn import ClassPrediction

_ROWS_AT_ONCE = 500


class OutOfTime(Exception):  # noqa: N818
    """The contest's time was up before the task was done."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """The device and the limits of tasks.

    Attributes:
        data_dir: The folder of the data sets.
        folder: Where posteriors are kept that other tasks need.
        budgets: Epochs, batch size and sizes of the data, by data set.
        device: Where it is computed.
        end: When the time is over, by `time.time`.
        eager: See `Course`.
    """

    data_dir: Path | None
    folder: Path
    budgets: Mapping[str, Budget]
    device: str
    end: float = math.inf
    eager: bool = False

    def posterior_of(self, task: Task) -> Path:
        """Return the file of what a task has learned."""
        return self.folder / f"{task.name()}.safetensors"


def perform(task: Task, place: Place) -> Result:
    """Train, or begin with what was trained, and measure.

    Raises:
        OutOfTime: The time is over.
        PersampleError: The data are missing.
    """
    began = time.monotonic()
    course = course_of(task, place)
    scores: dict[str, float] = {}
    problem = None
    try:
        predictor = _predictor(task, course, place)
        scores = measure(predictor, course, METHODS[task.method].draws, outside=not task.trial)
    except (PersampleError, ArithmeticError) as error:
        problem = f"{type(error).__name__}: {error}"
    return Result(scores, round(time.monotonic() - began, 1), place.device, problem)


def course_of(task: Task, place: Place) -> Course:
    """Return what a task trains on; the data are loaded once by each process."""
    budget, device = place.budgets[task.dataset], torch.device(place.device)
    data, outside = _data(task.dataset, place.data_dir, budget, task.trial, device)
    return Course(
        data=data,
        outside=outside,
        epochs=budget.epochs,
        batch_size=budget.batch_size,
        seed=task.seed,
        device=device,
        eager=place.eager,
    )


@functools.lru_cache(maxsize=4)
def _data(
    name: str, data_dir: Path | None, budget: Budget, trial: bool, device: torch.device
) -> tuple[ImageDataset, Tensor]:
    data, outside = load(name, data_dir, budget.samples)
    if trial:
        data = hold_out(data, budget.held_out, make_generator(0, "validation"))
    return on_device(data, device), outside.to(device)


def _predictor(task: Task, course: Course, place: Place) -> Predictor:
    """Return what the task learned, and keep it where another method needs it."""
    method = METHODS[task.method]
    if method.of is None:
        assert method.start is not None
        torch.manual_seed(derive_seed(task.seed, "noise") % 2**63)  # for dropout, which has no generator of its own
        training = method.start(course, **dict(task.settings))
        fit(training, course, place.end)
        predictor = training.predictor()
        if isinstance(predictor, Posterior) and any(other.of == task.method for other in METHODS.values()):
            predictor.save(place.posterior_of(task))
        return predictor
    members = [
        Posterior.load(place.posterior_of(need), course.network(), device=course.device) for need in task.needs()
    ]
    if method.convert is None:
        return Ensemble(members)
    own = {name: value for name, value in task.settings if name in TRIALS[task.dataset][task.method][0]}
    return method.convert(course, members[0], **own)


def fit(training: Training, course: Course, end: float = math.inf) -> None:
    """Train for all epochs.

    Args:
        training: How.
        course: On what.
        end: When to give up, by `time.time`.

    Raises:
        OutOfTime: It is later than `end` after an epoch.
        NonFiniteLossError: The training diverged.
    """
    inputs, targets = course.data.train_inputs, course.data.train_targets
    bases = [group["lr"] for group in training.optimizer.param_groups]
    steps = course.epochs * math.ceil(len(targets) / course.batch_size)
    step = 0
    for epoch in range(1, course.epochs + 1):
        order = torch.randperm(len(targets), generator=make_generator(course.seed, "order", epoch)).to(course.device)
        for rows in order.split(course.batch_size):
            factor = training.schedule(step / steps)
            for group, base in zip(training.optimizer.param_groups, bases, strict=True):
                group["lr"] = base * factor
            loss = training.step(inputs[rows], targets[rows])
            step += 1
        if not math.isfinite(loss.item()):
            raise NonFiniteLossError(f"the training loss became {loss.item()} in epoch {epoch}")
        training.after_epoch(epoch)
        if time.time() > end:
            raise OutOfTime


def measure(predictor: Predictor, course: Course, draws: int, *, outside: bool) -> dict[str, float]:
    """Return the metrics of averaged predictions on the held-out part of the data.

    Args:
        predictor: What was learned.
        course: With the data.
        draws: How many networks to average.
        outside: Whether to measure by the entropy how well the images of another kind are told from them, too.
    """
    data = course.data

    def predicted(inputs: Tensor) -> ClassPrediction:
        generator = course.generator("evaluation")
        return predictor.predict(inputs, samples=draws, generator=generator, rows_at_once=_ROWS_AT_ONCE)

    inside = predicted(data.test_inputs)
    probabilities, targets = inside.probabilities, data.test_targets
    scores = {
        "accuracy": (probabilities.argmax(1) == targets).double().mean().item(),
        "log_loss": metrics.log_loss(probabilities, targets),
        "calibration_error": metrics.calibration_error(probabilities, targets),
        "brier": metrics.brier_score(probabilities, targets),
    }
    if outside:
        scores["auroc"] = metrics.auroc(inside.entropy, predicted(course.outside).entropy)
    return scores
