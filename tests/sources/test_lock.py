"""Processes that are forked while another thread computes can compute themselves."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import persample
from persample import losses
from persample.kernels import autotune
from persample.sources.lock import Lock

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system knows no fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """After a fork OpenMP's threads are gone, and a child that wants them waits for ever, in plain PyTorch too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def exit_code_of_a_child(work: Any) -> int | None:
    """What a forked process that does `work` ends with, 0 if all is well; None if it hangs."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001 - a test must not go on in the child
            os._exit(1)
        os._exit(0)
    waiting = threading.Event()
    for _ in range(200):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        waiting.wait(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None


def test_forked_while_another_thread_computes(backend: str) -> None:
    inputs, targets = torch.randn(3, 4), torch.arange(3)
    inside, go_on = threading.Event(), threading.Event()

    def waiting_loss(outputs: Tensor, targets: Tensor) -> Tensor:
        inside.set()
        go_on.wait(30)
        return losses.cross_entropy(outputs, targets)

    busy = persample.make_source(backend, nn.Linear(4, 3), waiting_loss, check="never")
    idle = persample.make_source(backend, nn.Linear(4, 3), losses.cross_entropy)
    thread = threading.Thread(target=busy.moments, args=(inputs, targets))
    thread.start()
    inside.wait(30)
    try:
        assert exit_code_of_a_child(lambda: idle.moments(inputs, targets)) == 0
    finally:
        go_on.set()
        thread.join()
    busy.moments(inputs, targets)


def test_forked_while_another_thread_times_the_forms_of_a_product() -> None:
    inside, go_on = threading.Event(), threading.Event()

    def form(x: Tensor) -> tuple[Tensor]:
        inside.set()
        go_on.wait(30)
        return (x,)

    thread = threading.Thread(
        target=autotune.choose, args=(autotune.Key("waits", ()), lambda: {"a": form, "b": form}, torch.ones(1))
    )
    thread.start()
    inside.wait(30)

    def choose_another() -> None:
        autotune.choose(
            autotune.Key("does not wait", ()), lambda: {"a": lambda x: (x,), "b": lambda x: (x,)}, torch.ones(1)
        )

    try:
        assert exit_code_of_a_child(choose_another) == 0
    finally:
        go_on.set()
        thread.join()


def test_forked_by_the_thread_that_holds_it() -> None:
    lock = Lock()

    def leave_and_take_again() -> None:
        held.__exit__(None, None, None)
        with lock.held(), lock.held():
            pass

    held = lock.held()
    held.__enter__()
    assert exit_code_of_a_child(leave_and_take_again) == 0
    held.__exit__(None, None, None)
