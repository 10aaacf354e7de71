"""Importing the packages of the `experiments` extra when they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType

from persample.errors import MissingPackageError


def require(module: str, purpose: str) -> ModuleType:
    """Import `module`, or say which extra provides it.

    Args:
        module: Dotted name of the module to import.
        purpose: What it is needed for, as the subject of the error's sentence.

    Returns:
        The imported module.

    Raises:
        MissingPackageError: The module, or something that it needs itself, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(missing(error, purpose)) from error


def missing(error: ImportError, purpose: str) -> str:
    """Return the message for a package of the extra that cannot be imported."""
    return f'{purpose} cannot be used here ({error}); run: pip install "persample[experiments]"'
