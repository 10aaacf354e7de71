"""Why a step is not replayed, as exceptions inside of the package and as a line for the user."""

from __future__ import annotations

import re
from pathlib import Path


class NotReplayableError(Exception):
    """The step cannot be replayed; nothing of it was run."""


class NotRecordedError(Exception):
    """No graph fits this call. Nothing was run."""


class RecordedError(Exception):
    """A step was recorded and run for the first time. What Python does after it has been done by the ordinary call."""


class FailedError(Exception):
    """A recorded step raised an error, and the same call may go the ordinary way, which tells it better."""


_BY_VALUES = ("GuardOnDataDependentSymNode", "DataDependentOutputException", "DynamicOutputShapeException")


def in_one_line(error: Exception) -> str:
    """Return what an error says, in one line, and where in the user's code it comes from."""
    if isinstance(error, NotRecordedError):
        return "Dynamo is switched off"
    error = getattr(error, "inner_exception", error)
    text = str(error)
    if type(error).__name__ in _BY_VALUES:
        return "where entries go depends on the values of tensors"
    if "convert all Tensors to FakeTensors" in text:
        return "to which samples the entries of a tensor belong is found out by trial, which takes values"
    own = f"{NotReplayableError.__name__}: "  # what Dynamo has wrapped into an error of its own
    name = "" if isinstance(error, NotReplayableError) or text.startswith(own) else f"{type(error).__name__}: "
    places = re.findall(r'File "([^"]+)", line (\d+)', text.partition("from user code")[2])
    place = f" ({Path(places[-1][0]).name}:{places[-1][1]})" if places else ""
    return (name + first_line(text.removeprefix(own))).rstrip(".") + place


def first_line(text: str) -> str:
    """Return the first line of an error's text that is not empty."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "no message")
