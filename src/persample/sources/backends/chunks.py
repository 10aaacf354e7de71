"""Per-sample gradients that arrive in chunks of samples: concatenated, or summed into moments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from persample.dtypes import at_least_float32
from persample.errors import OptionError
from persample.moments import Moments

#: Losses `(b,)` and gradients `{name: (b, *parameter.shape)}` of the next b samples.
Chunk = tuple[Tensor, Mapping[str, Tensor]]


def per_sample_of_chunks(
    chunks: Iterable[Chunk], parameters: Mapping[str, nn.Parameter], size: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the losses and gradients of all `size` samples."""
    gradients = {name: p.new_empty((size, *p.shape)) for name, p in parameters.items()}
    losses: list[Tensor] = []
    start = 0
    for chunk_losses, rows in chunks:
        losses.append(chunk_losses)
        stop = start + len(chunk_losses)
        for name, g in rows.items():
            gradients[name][start:stop] = g
        start = stop
    return torch.cat(losses), gradients


def moments_of_chunks(chunks: Iterable[Chunk], parameters: Mapping[str, nn.Parameter], size: int) -> Moments:
    """Return the moments of all samples; only the gradients of one chunk are held at a time."""
    # Sums over many samples need more than the 8 or 11 bits of bfloat16 and float16.
    mean = {name: at_least_float32(torch.zeros_like(p, requires_grad=False)) for name, p in parameters.items()}
    second_moment = {name: torch.zeros_like(total) for name, total in mean.items()}
    losses: list[Tensor] = []
    for chunk_losses, gradients in chunks:
        losses.append(chunk_losses)
        for name, g in gradients.items():
            rows = g.to(mean[name].dtype)
            mean[name] += rows.sum(0) / size
            second_moment[name] += rows.square().sum(0) / size
    return Moments(
        losses=torch.cat(losses),
        mean={name: value.to(parameters[name].dtype) for name, value in mean.items()},
        second_moment={name: value.to(parameters[name].dtype) for name, value in second_moment.items()},
    )


def refuse_chunk_size(chunk_size: object) -> None:
    """Raise `OptionError` unless `chunk_size` is a positive integer, or None for the whole batch."""
    if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
        raise OptionError(f"chunk_size={chunk_size!r} must be a positive integer, or None for the whole batch.")
