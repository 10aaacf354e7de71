"""Random numbers of the device that tests run on: PyTorch's default device (`torch.set_default_device`)."""

from __future__ import annotations

import torch
from torch import Tensor


def on_cuda() -> bool:
    """Whether the tests run on a GPU."""
    return torch.get_default_device().type == "cuda"


def generator_of(seed: int) -> torch.Generator:
    """Return a generator of the device's random numbers."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def set_seed(seed: int) -> None:
    """Set the random numbers of the default device, where it is the CPU much faster than `torch.manual_seed`."""
    torch.default_generator.manual_seed(seed)
    if on_cuda():
        torch.cuda.manual_seed(seed)


def generator_state() -> Tensor:
    """Return the state of the default device's random numbers."""
    return torch.cuda.get_rng_state() if on_cuda() else torch.get_rng_state()


def set_generator_state(state: Tensor) -> None:
    """Set it to what `generator_state` returned."""
    if on_cuda():
        torch.cuda.set_rng_state(state)
    else:
        torch.set_rng_state(state)
