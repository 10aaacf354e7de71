"""Warnings that point to the user's line, however many frames of PyTorch and this package lie between."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

import torch

_INSIDE = (str(Path(torch.__file__).parent), str(Path(__file__).parent), contextlib.__file__)


def warn(message: str, category: type[Warning]) -> None:
    """Warn, naming the innermost line outside of PyTorch and this package."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
