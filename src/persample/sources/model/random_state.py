"""Saving and rewinding the random number generators, so that a forward pass draws the same numbers again.

They come from PyTorch's default generators, from those of Python's `random` and of NumPy, and from generators that
modules hold as attributes.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from persample.sources.model.modules import Types, modules_of

#: The states of the generators, each with the function that sets it.
RandomState = list[tuple[Callable[[Any], object], Any]]


def random_state(model: nn.Module) -> RandomState:
    """Return the states of the random number generators that a forward pass of `model` may draw from."""
    return [(write, read()) for read, write in (*_generators_of_torch(model), *_other_generators(model))]


def random_state_on(device: torch.device) -> RandomState:
    """Return the states of PyTorch's default generators of CPUs, and of this device."""
    return [(write, read()) for read, write in _default_generators({device})]


def other_random_state(model: nn.Module) -> RandomState:
    """Return the states of the generators that `torch.func` ignores."""
    return [(write, read()) for read, write in _other_generators(model)]


def set_random_state(state: RandomState) -> None:
    """Restore what `random_state` returned."""
    for write, value in state:
        write(value)


def same_random_state(first: RandomState, second: RandomState) -> bool:
    """Whether nothing was drawn between the two states."""
    # NumPy's generator comes last, and only in the second if NumPy was imported between the two.
    return all(_same(a, b) for (_, a), (_, b) in zip(first, second, strict=False))


@contextmanager
def random_state_restored(model: nn.Module, inside: RandomState) -> Iterator[None]:
    """Draw from the state `inside` within the context; afterwards, continue as if nothing had been drawn."""
    outside = random_state(model)
    set_random_state(inside)
    try:
        yield
    finally:
        set_random_state(outside)


_Generator = tuple[Callable[[], Any], Callable[[Any], object]]
"""How the state of a generator is read and written."""


def _generators_of_torch(model: nn.Module) -> Iterator[_Generator]:
    yield from _default_generators({p.device for p in model.parameters()})


def _default_generators(devices: Iterable[torch.device]) -> Iterator[_Generator]:
    yield torch.get_rng_state, torch.set_rng_state
    gpus = [device for device in devices if device.type == "cuda"]
    if gpus and torch.cuda.is_current_stream_capturing():
        return  # whoever captures a CUDA graph has its generators' states in hand
    for device in sorted(gpus, key=str):
        yield partial(torch.cuda.get_rng_state, device), partial(torch.cuda.set_rng_state, device=device)


def _other_generators(model: nn.Module) -> Iterator[_Generator]:
    yield random.getstate, random.setstate
    for own in _OWN.select(list(chain.from_iterable(vars(module).values() for module in modules_of(model)))):
        if isinstance(own, torch.Generator):
            yield own.get_state, own.set_state
        elif isinstance(own, random.Random):
            yield own.getstate, own.setstate
        else:
            yield partial(_read_numpy, own), partial(_write_numpy, own)
    numpy: Any = sys.modules.get("numpy.random")  # where nobody has imported it, nothing is drawn from it
    if numpy is not None:
        yield partial(_read_numpy, numpy), partial(_write_numpy, numpy)


_OWN = Types(
    lambda kind: (
        issubclass(kind, (torch.Generator, random.Random))
        or (kind.__module__.startswith("numpy.random") and kind.__name__ in ("Generator", "RandomState"))
    )
)


def _read_numpy(own: Any) -> Any:
    """Return the state of NumPy's global generator, or of one of its own."""
    return own.get_state() if hasattr(own, "get_state") else own.bit_generator.state


def _write_numpy(own: Any, state: Any) -> None:
    if hasattr(own, "set_state"):
        own.set_state(state)
    else:
        own.bit_generator.state = state


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(value, second[key]) for key, value in first.items())
    if isinstance(first, tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    return bool(first.tobytes() == second.tobytes()) if hasattr(first, "tobytes") else bool(first == second)
