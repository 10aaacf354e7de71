"""Kernels in Triton as one more form of the products of single samples, for float32 on GPUs.

Triton is imported when the first tensor of a GPU asks for it, and never for others. Without it, and for what its
kernels do not take, PyTorch's own operations compute.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from persample.kernels.autotune import is_deterministic
from persample.kernels.compiled import switched_off
from persample.kernels.pieces import Sums


def kernels_for(x: Tensor) -> ModuleType | None:
    """Return the module with the kernels' functions if they take tensors like `x`, else None."""
    if not x.is_cuda or x.dtype is not torch.float32 or x.numel() == 0 or switched_off() is not None:
        return None
    found = _import()
    return None if isinstance(found, str) else found


def by_triton(function: Callable[..., Sums], x: Tensor, delta: Tensor, *arguments: object) -> Sums:
    """Call one of those functions.

    Raises:
        RuntimeError: the kernel cannot be compiled or launched for these tensors, or does not take them.
    """
    from triton.errors import TritonError

    try:
        with torch.cuda.device_of(x):
            return function(x, delta, *arguments, fixed=is_deterministic())
    except (TritonError, subprocess.SubprocessError, OSError) as error:  # the second and third of a C compiler
        raise RuntimeError(f"Triton: {error}") from error


def about_triton() -> str:
    """Return in words whether the kernels in Triton compute on the GPUs here, and if not, why; empty without a GPU."""
    if not torch.cuda.is_available():
        return ""
    reason = switched_off()
    found = _import() if reason is None else reason
    return f"no Triton kernels: {found}" if isinstance(found, str) else "Triton kernels"


@cache
def _import() -> ModuleType | str:
    try:
        from persample.kernels.triton import launch
    except Exception as error:  # noqa: BLE001  a package for other hardware or another PyTorch raises what it likes
        return f"Triton cannot be imported ({type(error).__name__}: {error})"
    return launch
