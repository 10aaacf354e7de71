"""Running tasks in processes, several per device."""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from typing import TypeAlias

import torch

from persample.errors import DataError, MissingPackageError
from persample.experiments.contest.running import OutOfTime, Place, perform
from persample.experiments.contest.tasks import Result, Results, Task

Plan: TypeAlias = Callable[[Place, Results], Iterable[Task]]


def performed(plan: Plan, results: dict[Task, Result], places: Mapping[Place, int]) -> Iterator[Task]:
    """Run the plan's tasks until none is left or the time is up; yield each task when it is done.

    What fails by an error that is not the method's own is warned of, and left out.

    Args:
        plan: Returns the tasks that are known by now, those that a place shall begin with first.
        results: What is done; what this adds to it is there before the task is yielded.
        places: Where to perform tasks, and how many at a time.

    Raises:
        PersampleError: The data are missing.
    """
    spawn = multiprocessing.get_context("spawn")
    running: dict[Future[Result], tuple[Task, Place]] = {}
    failed: set[Task] = set()
    with ExitStack() as stack:
        pools = {
            place: stack.enter_context(ProcessPoolExecutor(jobs, mp_context=spawn, initializer=prepare))
            for place, jobs in places.items()
        }
        while True:
            for place, pool in pools.items():
                while sum(at is place for _, at in running.values()) < places[place] and time.time() < place.end:
                    task = _next(plan(place, results), results, {task for task, _ in running.values()} | failed)
                    if task is None:
                        break
                    running[pool.submit(perform, task, place)] = task, place
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task, place = running.pop(future)
                error = future.exception()
                if error is None:
                    results[task] = future.result()
                    yield task
                elif isinstance(error, DataError | MissingPackageError):
                    raise error
                elif not isinstance(error, OutOfTime):
                    failed.add(task)
                    what = error.__cause__ or repr(error)  # the cause has the traceback of the other process
                    warnings.warn(f"{task.name()} failed on {place.device}: {what}", stacklevel=2)
                    if isinstance(error, BrokenProcessPool):
                        pools.pop(place, None)


def prepare() -> None:
    """Let this process compute by one thread, and on a GPU by full float32, as a CPU does."""
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def _next(tasks: Iterable[Task], results: Results, others: set[Task]) -> Task | None:
    """Return the first task that is neither done nor in `others`, and whose requirements are done without problems."""
    for task in tasks:
        ready = all(need in results and results[need].problem is None for need in task.needs())
        if ready and task not in results and task not in others:
            return task
    return None
