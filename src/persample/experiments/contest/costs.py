"""The cost of a step of each method, relative to Adam."""

from __future__ import annotations

import statistics
import time

from persample.checks.benchmark import wait_for
from persample.experiments.contest.course import Course
from persample.experiments.contest.methods import METHODS
from persample.experiments.contest.settings import TRIALS


def step_costs(course: Course, rounds: int = 15) -> dict[str, float]:
    """Return the median time of a training step of each method over that of Adam.

    All take turns on the same batch, so that what else the machine does hits them alike.

    Args:
        course: With the data.
        rounds: How many steps of each are timed.
    """
    inputs, targets = (part[: course.batch_size] for part in (course.data.train_inputs, course.data.train_targets))
    tried = TRIALS[course.data.name]
    steps = {
        name: method.start(course, **tried[name][0]).step
        for name, method in METHODS.items()
        if method.start is not None
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 3):
        for name, step in steps.items():
            wait_for(course.device)
            began = time.perf_counter()
            step(inputs, targets)
            wait_for(course.device)
            if number >= 3:
                times[name].append(time.perf_counter() - began)
    adam = statistics.median(times["Adam"])
    return {name: statistics.median(took) / adam for name, took in times.items()}
