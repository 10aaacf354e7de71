"""The model that a command is asked for: one of the shipped ones, or `package.module:factory` of the user."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from persample.errors import OptionError
from persample.experiments.models import INPUT_SHAPES, MODELS, build_model


def load_model(name: str) -> tuple[nn.Module, Any]:
    """Return the model called `name`, and the example batch that came with it, or None.

    Args:
        name: a shipped model, or `package.module:factory`, found from the working directory too. What stands there is
            a module, or is called without arguments and returns a module or a pair of a module and an example batch.

    Raises:
        OptionError: there is no such model.
    """
    if name in MODELS:
        return build_model(name), None
    package, colon, attribute = name.partition(":")
    if not colon:
        raise OptionError(f"no model is called {name!r}; choose one of {', '.join(MODELS)}, or package.module:factory")
    made = _find(package, attribute)
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise OptionError(
                f"{name} is of type {type(made).__name__}, neither a module nor a function that makes one"
            )
        made = made()
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise OptionError(f"{name} made a {type(made).__name__}; it must make a module, or a module and a batch")
    return model, inputs


def sample_shape(name: str, shape: str | None) -> tuple[int, ...] | None:
    """Return the shape of a sample from "3,32,32", or that of a shipped model if `shape` is None.

    Raises:
        OptionError: that is no shape.
    """
    if shape is None:
        return INPUT_SHAPES.get(name)
    try:
        sizes = tuple(int(part) for part in shape.split(",") if part)
    except ValueError:
        sizes = (-1,)
    if any(size < 1 for size in sizes):
        raise OptionError(f"shape={shape!r} must be positive integers with commas between them, such as 3,32,32")
    return sizes


def random_inputs(shape: tuple[int, ...], tokens: int | None, size: int, dtype: torch.dtype) -> Tensor:
    """Return a batch of `size` samples of `shape`: random numbers, or integers below `tokens`."""
    if tokens is not None:
        return torch.randint(tokens, (size, *shape))
    return torch.randn(size, *shape, dtype=dtype)


def require_runs(network: nn.Module, inputs: Tensor) -> None:
    """Raise `OptionError` if `network` does not run on an example batch."""
    try:
        with torch.no_grad():
            network(inputs)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OptionError(
            f"the model does not run on {inputs.dtype} of shape {tuple(inputs.shape)} ({reason}): give its sample's "
            "shape by --shape, and --tokens if it takes integers"
        ) from error


def _find(package: str, attribute: str) -> Any:
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise OptionError(f"{package} cannot be imported: {error}") from error
    finally:
        if added:
            sys.path.remove(here)
    if not hasattr(module, attribute):
        raise OptionError(f"{package} has nothing called {attribute!r}")
    return getattr(module, attribute)
