"""Running one experiment in several processes, started by `torchrun`.

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
    """Join the process group if `torchrun` started this process, and leave it at the end."""
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
    """Return the group of all processes; None if this is the only one."""
    return dist.group.WORLD if dist.is_initialized() else None


def wait_for_all() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def own_share(rows: Tensor) -> Tensor:
    """Return this process's share of the rows, which may be empty."""
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
