"""Lending the parameters, which hold the mean of the posterior, to draws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from persample.errors import UsageError


class Lending:
    """Tracks whether the model holds a draw, and refuses calls meanwhile."""

    def __init__(self) -> None:
        self.out = False

    @contextmanager
    def lend(self, call: str) -> Iterator[None]:
        """Refuse calls that need the mean while `call` has draws in the model.

        Raises:
            UsageError: another call does so already.
        """
        self.refuse(call)
        self.out = True
        try:
            yield
        finally:
            self.out = False

    def refuse(self, call: str) -> None:
        """Raise if the model holds a draw.

        Raises:
            UsageError: it does; the message names `call`.
        """
        if self.out:
            raise UsageError(
                f"{call} cannot run inside sampled_params(), observe() or predict(), nor from another thread "
                "meanwhile: the parameters hold a draw from the posterior there, not its mean. Call it outside."
            )
