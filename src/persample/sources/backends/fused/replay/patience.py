"""When a kind of batch is worth being recorded, where nobody has asked for it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

_MOST_KINDS = 64  # counted at a time
_MOST_IN_VAIN = 2


class Patience:
    """What has come so far. Recording takes as long as some tens of calls, and a script of a few calls must not pay it.

    Args:
        calls: so many calls for batches of a kind go the ordinary way first,
        seconds: and take so long together, or as long as the last recording did.
    """

    def __init__(self, calls: int, seconds: float) -> None:
        self._calls, self._seconds = calls, seconds
        self._came: dict[Hashable, tuple[int, float]] = {}
        self._due: dict[Hashable, None] = {}
        self._in_vain = 0

    def is_due(self, kind: Hashable) -> bool:
        """Whether batches of this kind have come for long enough, now or before."""
        if kind in self._due:
            return True
        number, seconds = self._came.get(kind, (0, 0.0))
        if number < self._calls or seconds < self._seconds:
            return False
        self._came.pop(kind, None)
        _make_room(self._due)
        self._due[kind] = None
        return True

    def came(self, kind: Hashable, seconds: float) -> None:
        """Note an ordinary call, and how long it took."""
        number, before = self._came.pop(kind, (0, 0.0))
        _make_room(self._came)
        self._came[kind] = number + 1, before + seconds

    def recorded(self, seconds: float) -> None:
        """Note a recording, and how long it took."""
        self._seconds = max(self._seconds, seconds)
        self._in_vain += 1

    def served(self) -> None:
        """Note that a recorded step has served a call."""
        self._in_vain = 0

    @property
    def is_lost(self) -> bool:
        """Whether what was recorded serves no later call, as where a value changes in every call."""
        return self._in_vain >= _MOST_IN_VAIN


def _make_room(kinds: dict[Hashable, Any]) -> None:
    """Forget the kind that came in first, if there are many."""
    if len(kinds) >= _MOST_KINDS:
        del kinds[next(iter(kinds))]
