"""A lock that no forked process finds held by a thread that it does not have."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Lock:
    """A lock which a thread that holds it may take once more.

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
        """Hold it inside the context, in which the thread itself may fork."""
        with self._lock:
            yield
