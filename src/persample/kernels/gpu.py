"""Kernels in Triton: one more form of the products of single samples, for float32 on GPUs, and the optimizer's step.

Triton is imported when the first tensor of a GPU asks for it, and never for others. Without it, and for what its
kernels do not take, PyTorch's own operations compute.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from persample.kernels.autotune import is_deterministic
from persample.kernels.compiled import switched_off
from persample.kernels.operands import are_plain, plain_dtype
from persample.kernels.pieces import Sums
from persample.kernels.step_kinds import StepKernel

_log = logging.getLogger(__name__)


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


def step_kernels(kind: StepKernel, *lists: Sequence[Tensor]) -> ModuleType | None:
    """Return the module with the kernels of the optimizer's step if one of them takes these tensors, else None.

    All lie on one GPU, in one dtype, in order and without gaps. What a CUDA graph captures is left to PyTorch: the
    addresses that a launch is given are good for that launch alone.

    Args:
        kind: which kernel.
        lists: its operands.
    """
    first = next((t for tensors in lists for t in tensors), None)
    if first is None or not first.is_cuda or switched_off() is not None or plain_dtype(*lists) is None:
        return None
    if not are_plain(*lists) or any(t.device != first.device for tensors in lists for t in tensors):
        return None
    if isinstance(_import(), str) or torch.cuda.is_current_stream_capturing():
        return None
    if not _gives_the_right_numbers(kind, first.device, first.dtype):
        return None
    from persample.kernels.triton import launch_step

    return launch_step


@cache
def _gives_the_right_numbers(kind: StepKernel, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel runs on this GPU, and agrees there with PyTorch's operations: tried once, on a few numbers."""
    from persample.kernels.triton.trial import largest_error

    try:
        with torch.cuda.device(device):
            error = largest_error(kind, device, dtype)
        problem = "" if error <= (1e-5 if dtype is torch.float32 else 1e-12) else f"it is off by {error:.1e}"
    except Exception as problem_found:  # noqa: BLE001  whatever a compiler for GPUs raises: PyTorch computes instead
        problem = f"{type(problem_found).__name__}: {problem_found}"
    if problem:
        _log.warning("PyTorch's operations take the place of the Triton kernel %s of %s: %s", kind, dtype, problem)
    return not problem


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
