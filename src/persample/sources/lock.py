"""A reentrant lock that is free in forked processes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Lock:
    """A reentrant lock that is free in forked processes.

    A fork copies it as it is, but of the threads only the one that forks, so in the child it is a new one: nobody is
    left there to release it.
    """

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):  # where processes can be forked
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock inside the context; the holding thread may fork there."""
        with self._lock:
            yield
