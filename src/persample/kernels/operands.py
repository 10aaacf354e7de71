"""What a compiled kernel asks of its operands: addresses, sizes, one dtype, no gaps."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

#: How the names of kernels end, by the dtype that they compute in.
NAMES = {torch.float32: "float", torch.float64: "double"}


def plain_dtype(*lists: Sequence[Tensor]) -> str | None:
    """Return "float" or "double" if all tensors are of that dtype, in order and without gaps; else None."""
    dtype = lists[0][0].dtype if lists[0] else torch.float32
    same = all(t.dtype is dtype and t.is_contiguous() for tensors in lists for t in tensors)
    return NAMES.get(dtype) if same else None


def kernel_serves(*lists: Sequence[Tensor]) -> bool:
    """Whether a kernel may be called with these tensors outside of an operator, which asks by itself."""
    on_cpu = all(t.is_cpu for tensors in lists for t in tensors)
    return on_cpu and are_plain(*lists) and not torch.compiler.is_compiling()


def are_plain(*lists: Sequence[Tensor]) -> bool:
    """Whether no tensor is of a class that may keep its numbers elsewhere."""
    return {type(t) for tensors in lists for t in tensors} <= {Tensor, Parameter}


def addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """Return where the tensors begin in memory, for a kernel."""
    return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])


def sizes(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_int64]:
    """Return how many entries each of the tensors has, for a kernel."""
    return (ctypes.c_int64 * len(tensors))(*[t.numel() for t in tensors])


def refuse_other_shapes(tensors: Sequence[Tensor], **others: Sequence[Tensor]) -> None:
    """Raise if one of the `others`, by name, has not the shapes of `tensors`: a kernel would read beyond its memory.

    Raises:
        ValueError: it has not.
    """
    for name, compared in others.items():
        if len(compared) != len(tensors) or any(a.shape != b.shape for a, b in zip(tensors, compared, strict=True)):
            raise ValueError(
                f"The shapes of {name} are {[tuple(t.shape) for t in compared]}, those wanted "
                f"{[tuple(t.shape) for t in tensors]}."
            )
