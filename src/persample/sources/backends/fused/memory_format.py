"""Whether the channels of images lie side by side in memory."""

from __future__ import annotations

import torch
from torch import Tensor

_CHANNELS_LAST = {4: ((1, 3, 2, 0), torch.channels_last), 5: ((1, 4, 3, 2, 0), torch.channels_last_3d)}


def memory_format(x: Tensor) -> torch.memory_format:
    """Return what PyTorch's kernels take the memory format of `x` for, by its strides.

    They ask `Tensor::suggest_memory_format` of C++. The function of that name in `torch._prims_common` imports SymPy,
    which would make the first call of a process wait for half a second.
    """
    if x.dim() not in _CHANNELS_LAST or x.stride(1) == 0:
        return torch.contiguous_format
    order, channels_last = _CHANNELS_LAST[x.dim()]
    least = 0
    for dim in order:
        ambiguous = dim == 0 and least == x.stride(1)  # one pixel
        if x.shape[dim] == 0 or x.stride(dim) < least or ambiguous:
            return torch.contiguous_format
        least = x.stride(dim) * x.shape[dim]
    return channels_last
