"""The compiled kernels: finding the library for this processor, and computing without one.

The functions are called by `ctypes`, which lets go of Python's lock, and take pointers and sizes. They use the threads
of PyTorch: OpenMP's symbols are not linked, so that they are found in the library that PyTorch has loaded.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from persample.kernels.fingerprint import fingerprint_of

#: The libraries that may serve, the best first, by what PyTorch says of the processor.
_LIBRARIES = {"AVX512": ("avx512", "avx2"), "AVX2": ("avx2",)}
_OF_ARM = ("neon",)

#: The types of arguments, for `find_kernel`.
POINTER, SIZE, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int

_off = False


@contextmanager
def without_kernels() -> Iterator[None]:
    """Compute by PyTorch's own operations inside the context, in all threads."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


def switched_off() -> str | None:
    """Return what switches all kernels off, also those of a GPU; None if nothing does."""
    if os.environ.get("PERSAMPLE_KERNELS") == "0":
        return "PERSAMPLE_KERNELS=0 switches them off"
    return "they are switched off by without_kernels()" if _off else None


def instruction_set() -> str | None:
    """Return the instruction set of the kernels that compute here: "avx512", "avx2", "neon"; None if none do."""
    library = _library()
    return None if _off or isinstance(library, str) else library[0]


def why_no_kernels() -> str | None:
    """Return why PyTorch's own operations compute instead of the kernels; None if the kernels do."""
    library = _library()
    if isinstance(library, str):
        return library
    return switched_off()


def about_kernels() -> str:
    """Return in words whether the kernels compute here, and if not, why."""
    used = instruction_set()
    return f"C++ kernels for {used}" if used else f"no C++ kernels: {why_no_kernels()}"


def find_kernel(name: str, *types: Any) -> Callable[..., None] | None:
    """Return a compiled function; None if PyTorch's own operations should compute.

    Args:
        name: of the function in `csrc`.
        types: of its arguments: `POINTER`, `SIZE` or `INT`.
    """
    return None if _off else _function(name, types)


@cache
def _function(name: str, types: tuple[Any, ...]) -> Callable[..., None] | None:
    library = _library()
    if isinstance(library, str):
        return None
    function = getattr(library[1], name, None)
    if function is None:  # for such a dtype
        return None
    function.argtypes, function.restype = types, None
    return function  # type: ignore[no-any-return]


@cache
def _library() -> tuple[str, ctypes.CDLL] | str:
    if os.environ.get("PERSAMPLE_KERNELS") == "0":
        return "PERSAMPLE_KERNELS=0 switches them off"
    return best_library(Path(__file__).parent, torch.backends.cpu.get_cpu_capability())


def best_library(folder: Path, capability: str) -> tuple[str, ctypes.CDLL] | str:
    """Return the best library in a folder with its instruction set, or why there is none.

    Args:
        folder: with the compiled libraries.
        capability: what PyTorch says of the processor.
    """
    names = _OF_ARM if platform.machine() == "aarch64" else _LIBRARIES.get(capability, ())
    if not names:
        return f"there are none for this processor (PyTorch calls it {capability})"
    found = [(name, path) for name in names if (path := folder / f"_kernels_{name}.so").exists()]
    if not found:
        return "the package was installed without a C++ compiler: install one (g++), then the package again"
    name, path = found[0]
    try:
        library = ctypes.CDLL(str(path))
        built_from = ctypes.c_char_p.in_dll(library, "persample_fingerprint").value or b""
    except (OSError, ValueError) as error:
        return f"{path.name} cannot be loaded ({error})"
    if fingerprint_of(folder / "csrc") not in ("", built_from.decode()):
        return (
            f"{path.name} was compiled from other sources: run `python setup.py build_ext --inplace`, or install again"
        )
    return name, library
