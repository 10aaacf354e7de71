"""Draws from the Gaussian posterior, their noise, and restoring the mean."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

from persample.vogn.core import Tensors

#: The state of the generators that noise comes from, by their names: "own", or the device of a global one.
NoiseState: TypeAlias = dict[str, Tensor]


def draw(mean: Tensors, scale: Tensors, generator: torch.Generator | None) -> Tensors:
    """Return w = μ + σ ∘ ε with ε = `standard_noise(scale, generator)`, in the dtypes of the scale."""
    return torch._foreach_addcmul(mean, scale, standard_noise(scale, generator))


def standard_noise(like: Tensors, generator: torch.Generator | None) -> list[Tensor]:
    """Return ε ~ N(0, I) for each tensor of `like`, in its shape, dtype and device.

    All tensors of one dtype and device share one call of `torch.randn`, which gives a vector that is cut in their
    order. It comes from `generator`, on its own device, or from PyTorch's global generator of the tensors' device:
    whatever computes gradients afterwards, the same seed gives the same noise.
    """
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for index, tensor in enumerate(like):
        kinds.setdefault((tensor.dtype, tensor.device), []).append(index)
    noise: list[Tensor] = [torch.empty(0, device="cpu")] * len(like)
    for (dtype, device), indices in kinds.items():
        sizes = [like[index].numel() for index in indices]
        source = generator.device if generator is not None else device
        pinned = source.type == "cpu" and device.type == "cuda"  # so that nobody waits for the copy
        vector = torch.randn(sum(sizes), dtype=dtype, device=source, generator=generator, pin_memory=pinned)
        vector = vector.to(device, non_blocking=pinned)
        for index, piece in zip(indices, vector.split(sizes), strict=True):
            noise[index] = piece.view(like[index].shape)
    return noise


def noise_state(generator: torch.Generator | None, devices: Iterable[torch.device]) -> NoiseState:
    """Return the state of `generator`, or of PyTorch's global generators of `devices` if it is None."""
    if generator is not None:
        return {"own": generator.get_state()}
    return {
        str(device): torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
        for device in devices
    }


@contextmanager
def noise_from(state: NoiseState, generator: torch.Generator | None) -> Iterator[None]:
    """Draw as from `state` inside the context, and go on afterwards as if nothing had been drawn."""
    present = noise_state(generator, map(torch.device, state.keys() - {"own"}))
    set_noise_state(state, generator)
    try:
        yield
    finally:
        set_noise_state(present, generator)


def set_noise_state(state: NoiseState, generator: torch.Generator | None) -> None:
    """Set `generator`, or the global ones of PyTorch if it is None, to what `noise_state` returned."""
    for name, value in state.items():
        if generator is not None:
            generator.set_state(value)
        elif torch.device(name).type == "cuda":
            torch.cuda.set_rng_state(value, name)
        else:
            torch.set_rng_state(value)


@contextmanager
def restored(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield copies of `tensors`, and write them back at the end, bit for bit, whatever happened in between.

    The values are copied in place, no storage is swapped: views, optimizers and other processes that hold the tensors
    keep seeing them.
    """
    with torch.no_grad():
        saved = [t.clone() for t in tensors]
    try:
        yield saved
    finally:
        with torch.no_grad():
            torch._foreach_copy_(tensors, saved)
