"""Which models an optimizer can train: unwrapped ones whose parameters are ordinary tensors of this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from persample.errors import OptionError, UnsupportedModelError, UsageError
from persample.sources.model.modules import modules_of
from persample.sources.model.refusals import SHARDED, describe, is_sharded


def refuse_model(model: Any, *, several_processes: bool) -> None:
    """Raise unless an optimizer can train `model`.

    Args:
        model: what the user gave.
        several_processes: whether the optimizer takes a `process_group`.

    Raises:
        OptionError: it is no module, or a wrapper that spreads batches over processes or devices.
        UnsupportedModelError: its parameters are sharded over processes.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"model is of type {type(model).__name__}: pass the torch.nn.Module itself, and the parameters to train "
            "as params=...."
        )
    for module, path in modules_of(model).items():
        if isinstance(module, DistributedDataParallel):
            raise OptionError(f"{describe(path, module)} {_averages(several_processes)}")
        if isinstance(module, DataParallel):
            raise OptionError(
                f"{describe(path, module)} splits batches over devices, where per-sample gradients are not "
                f"accessible: {_UNWRAP}."
            )
        if _is_fsdp(module):
            raise UnsupportedModelError(f"{describe(path, module)} {SHARDED}")
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise UnsupportedModelError(f"Parameter {name!r} {SHARDED}")


_UNWRAP = "pass the module inside (its .module) to the optimizer, and call that"


def _averages(several_processes: bool) -> str:
    instead = (
        "train the processes together by process_group=torch.distributed.group.WORLD"
        if several_processes
        else "to train in several processes, use VOGN, OGN or IVON with process_group="
    )
    return (
        "averages gradients over processes, but not what the posterior needs, so the replicas would drift apart: "
        f"{_UNWRAP}; {instead}."
    )


def refuse_processes(rule: str) -> NoReturn:
    """Refuse a `process_group` for a rule that needs each draw separately, which processes cannot sum.

    Raises:
        OptionError: always.
    """
    raise OptionError(f"{rule} does not support process_group: use VOGN, OGN or IVON to train in several processes.")


@contextmanager
def refuse_replicas(model: nn.Module, *, several_processes: bool) -> Iterator[None]:
    """Refuse calls of `model` that come from DistributedDataParallel around it.

    Raises:
        UsageError: such a call came.
    """

    def look(*_: Any) -> None:
        if getattr(DistributedDataParallel, "_active_ddp_module", None) is not None:
            raise UsageError(f"The model was called by a DistributedDataParallel, which {_averages(several_processes)}")

    handle = model.register_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()


def _is_fsdp(module: nn.Module) -> bool:
    loaded: Any = sys.modules.get("torch.distributed.fsdp")  # without it no module can be one of its
    return loaded is not None and isinstance(module, loaded.FullyShardedDataParallel)
