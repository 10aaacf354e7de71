"""Several processes that train one posterior: sums over processes, and noise of each process."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from persample.errors import OptionError, UsageError
from persample.moments import Moments
from persample.vogn.observations import Observations, Observed
from persample.warn import warn


class SeparateProcessesWarning(UserWarning):
    """Several processes run, and each trains its own posterior."""


class Processes:
    """A process group, seen from one process.

    Each observes batches of its own at draws of its own. A step adds up what all have observed, as if one process had
    observed all of it, so all hold the same posterior afterwards.

    Args:
        group: the group, on which every process makes the same calls in the same order.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        if not isinstance(group, dist.ProcessGroup):
            raise OptionError(
                f"process_group={group!r} must be a group of torch.distributed, for example "
                "torch.distributed.group.WORLD after torch.distributed.init_process_group()."
            )
        self.group = group
        self.rank = dist.get_rank(group)
        self._first = dist.get_global_rank(group, 0)
        self._noise: tuple[tuple[int, int], torch.Generator] | None = None

    def share_model(self, model: nn.Module) -> None:
        """Broadcast the parameters and buffers of the first process."""
        for tensor in (*model.parameters(), *model.buffers()):
            values = tensor.detach().contiguous()
            dist.broadcast(values, self._first, group=self.group)
            with torch.no_grad():
                tensor.copy_(values)

    def share_seed(self, seed: int) -> int:
        """Return the seed of the first process."""
        seeds = [seed]
        dist.broadcast_object_list(seeds, self._first, group=self.group)
        return seeds[0]

    def noise(self, seed: int, step: int) -> torch.Generator:
        """Return this process's generator for one step, which continues within the step."""
        if self._noise is None or self._noise[0] != (seed, step):
            self._noise = ((seed, step), noise_of_rank(seed, self.rank, step))
        return self._noise[1]

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true in any process."""
        flags: list[bool | None] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(flags, flag, group=self.group)
        return any(flags)

    def merged(self, observations: Observations, params: Mapping[str, Tensor]) -> Observations:
        """Return the observations of all processes together, by one `all_reduce` of one vector.

        Args:
            observations: what this process has observed, in at most one part. It may be nothing.
            params: the trained parameters by name, of which all that require a gradient are in the result.
        """
        trained = {name: p for name, p in params.items() if p.requires_grad}
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in trained.values()) else torch.float32
        device = next(iter(params.values())).device
        moments = observations.parts[0].moments if observations.parts else None
        size = moments.batch_size if moments else 0
        pieces = [torch.tensor([size, 0.0], dtype=dtype, device=device)]
        for part in (moments.mean, moments.second_moment) if moments else ({}, {}):
            pieces += [_sum(part.get(name), p, size, dtype, device) for name, p in trained.items()]
        if moments:
            pieces[0][1] = moments.losses.sum()
        vector = torch.cat(pieces)
        dist.all_reduce(vector, group=self.group)
        if vector[0] == 0:
            return Observations()
        total = round(vector[0].item())
        vector /= total
        means = vector[2:].split([p.numel() for p in trained.values()] * 2)
        rows = [row.view(p.shape).to(p.device) for row, p in zip(means, [*trained.values()] * 2, strict=True)]
        return Observations(
            [
                Observed(
                    Moments(
                        losses=vector[1].expand(total),  # the single ones stay where they are
                        mean=dict(zip(trained, rows, strict=False)),
                        second_moment=dict(zip(trained, rows[len(trained) :], strict=True)),
                    )
                )
            ]
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Processes:
        return self

    def __reduce__(self) -> NoReturn:
        raise UsageError("An optimizer with a process_group cannot be pickled: save its state_dict() instead.")


def warn_of_separate_processes() -> None:
    """Warn if several processes run, but the optimizer was given no `process_group`."""
    if dist.is_available() and dist.is_initialized():
        number = dist.get_world_size()
    else:  # torchrun says how many there are; torch.distributed.group.WORLD is None before init_process_group()
        number = int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    if number > 1:
        warn(
            f"{number} processes run, but the optimizer was given no process_group, so each trains its own posterior. "
            "To train one together, call torch.distributed.init_process_group() first, and pass "
            "process_group=torch.distributed.group.WORLD to VOGN, OGN or IVON.",
            SeparateProcessesWarning,
        )


def noise_of_rank(seed: int, rank: int, step: int) -> torch.Generator:
    """Return the source of the noise of one process for one step.

    It depends on these three numbers alone: after loading a checkpoint the noise is that of an uninterrupted run.
    """
    digest = hashlib.sha256(f"{seed} {rank} {step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def _sum(mean: Tensor | None, param: Tensor, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if mean is None:
        return torch.zeros(param.numel(), dtype=dtype, device=device)
    return mean.flatten().to(device, dtype) * size
