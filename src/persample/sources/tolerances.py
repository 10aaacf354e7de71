"""How far two computations of the same number may lie apart before one of them is wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from persample.sources.graph import nodes_behind

_RELATIVE = {torch.float64: 1e-7, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}

#: The part of a gradient that rounding may move elsewhere. Where the largest two pixels of a pooling window, or the two
#: sides of a ReLU, are nearly equal, rounding decides which of them gets the gradient, and a batch may be rounded
#: otherwise than its single samples. A backend that is off by more than rounding, but no more than this, is right if it
#: is right in float64, where that is as good as excluded.
MOVED = 5e-2


def tolerance(values: Tensor) -> float:
    """Return the relative difference that rounding can explain, for a computation that gave `values`.

    If they have an autograd graph, the least precise of its numbers counts: many language models normalise in
    float32 whatever the dtype of their parameters. Under autocast the results are float32, but most products were
    rounded to 8 (bfloat16) or 11 bits.
    """
    if torch.is_autocast_enabled(values.device.type):
        return _RELATIVE[torch.bfloat16]
    dtypes = {output.dtype for node in nodes_behind(values) for output in node._input_metadata} | {values.dtype}
    return max(_RELATIVE[real] for dtype in dtypes if (real := dtype.to_real()) in _RELATIVE)
