"""The package as it was at an earlier commit, in a process of its own that computes when it is asked to.

The two cannot be imported into one process. Each call is asked for through a pipe, and timed where it runs, so that
both builds take turns in one run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

#: The build before replay and kernels.
COMMIT = "4da6825"

#: The name of its column.
EARLIER = "build before"

# Threads wait for more work in a loop before they sleep, and would take the cores from the other process, in seconds.
_UNTIL_ASLEEP = 0.02

#: How long each of them takes in each round, in seconds.
Timed = Callable[[], float]


class NoHistoryError(Exception):
    """The commit is not there: this is no checkout with its history."""


def timed(call: Callable[[], Any]) -> Timed:
    """Return a function that runs `call` twice and returns the seconds of the second.

    The first finds the caches and the memory that another one left.
    """

    def run() -> float:
        call()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return run


def in_turns(calls: Mapping[str, Timed], rounds: int, warm_up: int = 3) -> dict[str, list[float]]:
    """Return the seconds of each call in each round but the first few, in which they check, choose and record."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(rounds + warm_up):
        for name, call in calls.items():
            time.sleep(_UNTIL_ASLEEP)
            took = call()
            if round_number >= warm_up:
                seconds[name].append(took)
    return seconds


@contextmanager
def with_earlier(calls: Mapping[str, Timed], kind: str, problem: tuple[Any, Any, Any]) -> Iterator[dict[str, Timed]]:
    """Yield `calls`, and that of the earlier build as `EARLIER`; without it, and saying so, where there is none."""
    with ExitStack() as stack:
        try:
            earlier = {EARLIER: stack.enter_context(earlier_build(kind, problem))}
        except NoHistoryError as error:
            print(f"The column {EARLIER!r} is left out: {error}.", file=sys.stderr)
            earlier = {}
        yield {**calls, **earlier}


@contextmanager
def earlier_build(kind: str, problem: tuple[Any, Any, Any]) -> Iterator[Timed]:
    """Yield a function that has the earlier build do one call of its own, and returns the seconds.

    Args:
        kind: "moments" or "step", see `_call`.
        problem: model, inputs and targets; the models of that time had other sizes.

    Raises:
        NoHistoryError: there is no such commit.
    """
    with tempfile.TemporaryDirectory() as folder:
        _unpack(Path(folder))
        file = Path(folder, "problem.pt")
        torch.save(problem, file)
        environment = os.environ | {"PYTHONPATH": str(Path(folder, "src"))}
        command = [sys.executable, __file__, kind, str(file), str(torch.get_num_threads())]
        with subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            pipe_in, pipe_out = process.stdin, process.stdout

            def ask() -> float:
                print(file=pipe_in, flush=True)
                return float(pipe_out.readline())

            yield ask
            pipe_in.close()


def _unpack(folder: Path) -> None:
    """Write the package's sources of that commit into a folder."""
    repository = Path(__file__).parents[1]
    command = ["git", "-C", str(repository), "archive", COMMIT, "src"]
    try:
        archive = subprocess.run(command, check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        told = getattr(error, "stderr", b"").decode().strip() or str(error)
        raise NoHistoryError(f"commit {COMMIT} cannot be taken from git here ({told})") from error
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")


def _call(kind: str, file: str) -> Callable[[], Any]:
    """What the process of the earlier build does; it has only the interfaces of that time."""
    import persample

    model, inputs, targets = torch.load(file, weights_only=False)
    loss_fn = persample.losses.cross_entropy
    if kind == "moments":
        source = persample.make_source("fused", model, loss_fn, check="never")
        return lambda: source.moments(inputs, targets)
    optimizer = persample.VOGN(model, loss_fn, data_size=50_000, lr=1e-4, hess_init=0.1, momentum=0.9)

    def step() -> None:
        optimizer.observe(inputs, targets)
        optimizer.step()

    return step


def _serve(kind: str, file: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    call = timed(_call(kind, file))
    for _ in sys.stdin:
        print(call(), flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
