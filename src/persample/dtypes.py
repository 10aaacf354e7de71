"""The dtypes in which everything but the model itself is computed and kept."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a floating-point tensor in its dtype, but at least float32; what is precise enough comes back as it is."""
    return tensor if tensor.dtype in _PRECISE else tensor.to(torch.promote_types(tensor.dtype, torch.float32))


_PRECISE = (torch.float32, torch.float64)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which sums over samples are taken: autocast is off."""
    active = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if active else nullcontext()
