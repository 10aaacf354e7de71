"""The parameters of a model, which hold the mean of the posterior, but for as long as draws are written into them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from persample.errors import UsageError


class Lending:
    """Whether the model holds a draw, and what must not be called there."""

    def __init__(self) -> None:
        self.out = False

    @contextmanager
    def lend(self, call: str) -> Iterator[None]:
        """Refuse what would find draws instead of the mean, for as long as `call` writes draws into the model.

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
                f"{call} cannot run inside sampled_params(), or while observe() or predict() runs (in another thread, "
                "for example): the parameters are a draw from the posterior there, not its mean. Call it outside."
            )
