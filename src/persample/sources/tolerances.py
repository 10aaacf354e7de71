"""How far two computations of the same number may lie apart before one of them is wrong."""

from __future__ import annotations

import torch
from torch import Tensor


def tolerance(values: Tensor) -> float:
    """Return the relative difference that rounding can explain, for a computation that gave `values`.

    Under autocast the results are float32, but most products were rounded to 8 (bfloat16) or 11 bits.
    """
    if values.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(values.device.type):
        return 5e-2
    return 1e-7 if values.dtype == torch.float64 else 1e-3
