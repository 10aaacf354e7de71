"""Suppressing warnings that the user cannot act on."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_warnings(*beginnings: str) -> Iterator[None]:
    """Suppress, inside the context, warnings whose text begins with one of these.

    Unlike `warnings.catch_warnings` it does not make Python forget which warnings it has shown: those that a forward
    pass of the user gives are to be seen once, not once for each call.

    Args:
        *beginnings: how the texts begin.
    """
    own: list[Any] = [("ignore", re.compile(re.escape(text)), Warning, None, 0) for text in beginnings]
    filters: list[Any] = warnings.filters  # type: ignore[assignment]
    try:
        filters[:0] = own
        yield
    finally:
        for entry in own:
            if entry in filters:
                filters.remove(entry)
