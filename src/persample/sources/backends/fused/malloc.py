"""Keeping freed memory in the process, so that each call need not request it from the system again."""

from __future__ import annotations

from functools import cache

import torch

_LARGEST_THAT_COUNTS = 2**25 - 2**13  # bytes


@cache
def keep_freed_memory() -> None:
    """Let freed memory of up to 64 MiB stay with the process.

    The allocator of the C library (glibc) gives the free end of its memory back to the system when that is longer
    than twice the largest block that was ever freed. The moments of a model, made and freed in every step, may be such
    an end; then each of their pages is handed out anew, cleared, in every step, which can cost as much as computing
    what they hold. So one large block is freed once: it is never written, and so costs nothing.
    """
    torch.empty(_LARGEST_THAT_COUNTS, dtype=torch.uint8, device="cpu")
