"""Predictions for all batches of a DataLoader, at the same draws of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from typing import Any, TypeVar

import torch

from persample.errors import BatchError
from persample.vogn.sampling import noise_state, set_noise_state

T = TypeVar("T")


def at_the_same_draws(
    batches: Iterable[Any], generator: torch.Generator | None, devices: set[torch.device], ask: Callable[[Any], T]
) -> Iterator[T]:
    """Yield `ask` of each batch, restarting the noise each time.

    After the last batch the generator is where one call would have left it.

    Args:
        batches: the batches.
        generator: where `ask` takes the noise from; None is PyTorch's global generators of `devices`.
        devices: those of the parameters.
        ask: predicts for a batch.
    """
    begin = ended = None
    for batch in batches:
        of_loader = noise_state(generator, devices)  # loaders shuffle and transform by the same generators
        begin = begin or of_loader
        set_noise_state(begin, generator)
        yield ask(batch)
        ended = noise_state(generator, devices)
        set_noise_state(of_loader, generator)
    if ended is not None:
        set_noise_state(ended, generator)


def joined(parts: Iterable[Any]) -> Any:
    """Concatenate predictions for parts of the samples.

    Raises:
        BatchError: there is no part.
    """
    parts = list(parts)
    if not parts:
        raise BatchError("The loader has no batches, so there is nothing to predict: pass one with data.")
    kind = type(parts[0])
    return kind(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(kind)})
