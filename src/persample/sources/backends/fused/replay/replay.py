"""The recorded steps of one source: which serves a call, and when one is recorded."""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from persample.sources.backends.fused.replay.ordinary import Ordinary
from persample.sources.backends.fused.replay.patience import Patience
from persample.sources.backends.fused.replay.request import Request
from persample.sources.backends.fused.replay.runners import Way
from persample.sources.backends.fused.replay.step import IN_VAIN, Step
from persample.sources.backends.fused.replay.untried import tensors_of, why_untried
from persample.sources.batch import Batch

_log = logging.getLogger(__name__)

# When a step is recorded for which nobody has asked.
_CALLS, _SECONDS = 10, 0.1

_MOST_STEPS = 8


class Replay:
    """The recorded steps of one source.

    Nothing of them is copied or pickled: a copy begins without any.

    Args:
        way: how recorded operations are run.
        by_itself: whether nobody has asked for it. Then a step is recorded when it is worth it (see `Patience`), and
            nothing is said if it cannot be.

    Attributes:
        reason: why the last step was not replayed, or not in that way; empty if it was, or if it is too early to try.
        ran: how it was run; None if not by recorded operations.
    """

    def __init__(self, way: Way, *, by_itself: bool = False) -> None:
        self.reason = ""
        self.ran: Way | None = None
        self.by_itself = by_itself
        self._way = way
        self._patience = Patience(_CALLS, _SECONDS) if by_itself else None
        self._steps: list[Step] = []
        self._told: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return vars(Replay(self._way, by_itself=self.by_itself))

    def run(self, source: Ordinary, batch: Batch, what: Request) -> Any:
        """Return what is wanted of `batch`, by a recorded step or the ordinary way."""
        tensors = tensors_of(batch)
        if self._patience is None or self._patience.is_due(kind := _kind(batch, tensors, what)):
            result = self._result(source, batch, tensors, what)
            return what.compute(source, batch, what.tensors) if result is None else result
        self.reason, self.ran = "", None
        start = time.perf_counter()
        result = what.compute(source, batch, what.tensors)
        self._patience.came(kind, time.perf_counter() - start)
        return result

    def _result(self, source: Ordinary, batch: Batch, tensors: Sequence[Tensor], what: Request) -> Any:
        """Return what is wanted by a recorded step, or while one is recorded; None if it must go the ordinary way."""
        self.reason, self.ran, result = why_untried(source.model, batch, tensors), None, None
        if not self.reason:
            step = next((step for step in self._steps if step.fits(source)), None)
            lost = self._patience is not None and self._patience.is_lost
            if step is None and len(self._steps) >= _MOST_STEPS:
                self.reason = f"attributes of the model have changed {_MOST_STEPS} times"
            elif step is None and lost:
                self.reason = IN_VAIN
            else:
                if step is None:
                    step = Step(source, self._way)
                    self._steps.append(step)
                start = time.perf_counter()
                result = step.result(source, batch, what, may_record=not lost)
                self.reason, self.ran = step.ran_because, step.ran
                if self._patience is not None and step.was_recorded:
                    self._patience.recorded(time.perf_counter() - start)
                elif self._patience is not None and step.ran is not None:
                    self._patience.served()
        self._tell()
        return result

    def leave(self, reason: str) -> None:
        """Note that a step goes the ordinary way."""
        self.reason, self.ran = reason, None
        self._tell()

    def _tell(self) -> None:
        if self.reason and self.reason not in self._told:
            self._told.add(self.reason)
            left = f" by {self._way}" if self.ran else ""
            level = logging.INFO if self.by_itself else logging.WARNING
            _log.log(level, "Backend 'fused' does not replay the step of this model%s: %s.", left, self.reason)


def _kind(batch: Batch, tensors: Sequence[Tensor], what: Request) -> Hashable:
    """Return what batches of one kind have in common."""
    return what.key, batch.kind(), *[t.shape for t in tensors]
