"""Several processes that run one experiment together, as `torchrun` starts them.

The first of them reads and writes all files but the data and the checkpoints; the others help it train.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes if `torchrun` has started this one, and leave them at the end."""
    if not dist.is_torchelastic_launched():
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def count() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Return whether this process is the first one, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def group() -> dist.ProcessGroup | None:
    """Return the group of all processes, or None if this is the only one."""
    return dist.group.WORLD if dist.is_initialized() else None


def wait_for_all() -> None:
    """Go on when every process is here."""
    if dist.is_initialized():
        dist.barrier()


def own_share(rows: Tensor) -> Tensor:
    """Return every so-manyth of the rows, so that each has one process; it may be none."""
    return rows[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else rows


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over the processes, in one call."""
    if not dist.is_initialized():
        return
    tensors = list(tensors)
    vector = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(vector)
    for tensor, part in zip(tensors, vector.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
