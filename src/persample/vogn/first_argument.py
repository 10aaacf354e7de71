"""The first argument of an optimizer: a model, or its parameters as every PyTorch optimizer takes them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

from torch import nn

from persample.errors import OptionError

Trained: TypeAlias = nn.Module | Iterator[nn.Parameter] | Iterator[tuple[str, nn.Parameter]]


def model_and_params(first: Any, params: Iterable[Any] | None) -> tuple[Any, Iterable[Any] | None]:
    """Return the model, and which of its parameters to train.

    The model is needed, as it is what gets per-sample gradients. `model.parameters()` and `model.named_parameters()`
    are generators that know it until they are first advanced.

    Args:
        first: the first argument of the optimizer.
        params: its argument of that name.

    Raises:
        OptionError: `first` holds parameters, but does not tell of which model; it holds something else; or both name
            parameters.
    """
    if isinstance(first, nn.Module) or not isinstance(first, Iterable):
        return first, params
    model = _model_of(first)
    if model is None:
        raise OptionError(
            f"The first argument is of type {type(first).__name__}, which does not say which model the parameters "
            "belong to: pass the model, model.parameters() or model.named_parameters() itself; pass parameter groups "
            "and lists as params=..., beside the model."
        )
    if params is not None:
        raise OptionError("The first argument and params both name parameters: pass the model and params=...")
    entries = [entry[1] if isinstance(entry, tuple) else entry for entry in first]
    if not all(isinstance(entry, nn.Parameter) for entry in entries):
        raise OptionError(
            "The first argument yields something else than parameters: pass the model, model.parameters() or "
            "model.named_parameters()."
        )
    return model, [p for p in entries if p.requires_grad]


def _model_of(parameters: Iterable[Any]) -> nn.Module | None:
    """The model whose method created the generator; None if it was advanced, or is another generator."""
    if not inspect.isgenerator(parameters) or inspect.getgeneratorstate(parameters) != inspect.GEN_CREATED:
        return None
    model = inspect.getgeneratorlocals(parameters).get("self")
    return model if isinstance(model, nn.Module) else None
