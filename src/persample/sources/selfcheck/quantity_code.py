"""Running the code of a quantity, which may be the user's, so that its errors are not taken for those of a backend."""

from __future__ import annotations

from collections.abc import Callable, Collection
from traceback import walk_tb
from types import TracebackType
from typing import Any, TypeVar

from persample.errors import RAW_ERRORS, QuantityError
from persample.quantities.block import Block
from persample.quantities.protocol import Accumulation, Quantity, Setting

Found = TypeVar("Found")


class QuantityCode:
    """An accumulation, as `begin` of a quantity returns it, with errors that name the quantity.

    Args:
        quantity: the quantity.
        setting: what it is taken of.

    Raises:
        QuantityError: `begin` fails, or returns something else.
    """

    def __init__(self, quantity: Quantity[Any], setting: Setting) -> None:
        self.name = quantity.name
        accumulation = self._run("begin", quantity.begin, setting)
        if not isinstance(accumulation, Accumulation):
            raise QuantityError(
                f"begin() of quantity {self.name!r} returned {type(accumulation).__name__}: return an object of a "
                "subclass of persample.quantities.Accumulation."
            )
        self.accumulation = accumulation

    @property
    def rereads(self) -> bool:
        """As of the accumulation."""
        return self.accumulation.rereads

    @property
    def reads(self) -> Collection[str]:
        """As of the accumulation."""
        return self.accumulation.reads

    def add(self, block: Block) -> None:
        """Give it a block."""
        self._run("add", self.accumulation.add, block)

    def another_round(self) -> bool:
        """Whether it wants another round."""
        return self._run("another_round", self.accumulation.another_round)

    def result(self) -> Any:
        """Return what it found."""
        return self._run("result", self.accumulation.result)

    def _run(self, method: str, function: Callable[..., Found], *arguments: Any) -> Found:
        try:
            return function(*arguments)
        except Exception as error:
            if type(error) not in RAW_ERRORS or "allocate memory" in str(error) or _in_backend(error.__traceback__):
                raise
            message = str(error).strip().split("\n")[0].rstrip(".") or "no message"
            raise QuantityError(
                f"{method}() of quantity {self.name!r} failed ({type(error).__name__}: {message}). The backend and the "
                "model are not the cause: see the error above for the line in the quantity's code."
            ) from error


def _in_backend(traceback: TracebackType | None) -> bool:
    """Whether an error arose in a block's own methods, which are a backend's."""
    return any(
        isinstance(frame.f_locals.get("self"), Block) and frame.f_globals.get("__name__") != Block.__module__
        for frame, _ in walk_tb(traceback)
    )
