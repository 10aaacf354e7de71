"""Changes of a model after its optimizer was created: parameters replaced, resized, renamed or added."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from persample.errors import UnsupportedModelError, UsageError
from persample.sources.model.modules import modules_of
from persample.sources.model.refusals import SHARDED, is_sharded
from persample.warn import warn


class UntrainedParameterWarning(UserWarning):
    """A parameter requires a gradient, but the optimizer does not train it."""


def fingerprint(model: nn.Module) -> list[tuple[Any, ...]]:
    """Return a list that changes if a parameter is replaced, resized, moved, added, removed, frozen or unfrozen.

    At the cost of one loop, because every step looks.
    """
    return [
        (id(p), p.requires_grad, p.shape, p.data_ptr() if p.layout is torch.strided else 0)
        for module in modules_of(model)
        for p in module._parameters.values()
        if p is not None
    ]


def present_names(model: nn.Module, params: Sequence[Tensor], known: Sequence[str]) -> list[str]:
    """Return the current names of `params` in the model.

    Args:
        model: the network.
        params: the parameters of a group.
        known: the names that they had.

    Raises:
        UnsupportedModelError: one was sharded.
        UsageError: one was replaced or removed.
    """
    present = dict(model.named_parameters())
    names = {id(p): name for name, p in present.items()}
    for p, name in zip_longest(params[: len(known)], known):
        if p is None or id(p) in names:
            continue
        if name in present and is_sharded(present[name]):
            raise UnsupportedModelError(f"Parameter {name!r} {SHARDED}")
        what = "replaced by another tensor" if name in present else "removed from the model"
        raise UsageError(
            f"Parameter {name!r} was {what} after the optimizer was created (a new layer, "
            "load_state_dict(assign=True), tied weights, another kind of module), so the optimizer would train a "
            "tensor that the model does not use. Change the model first and create the optimizer afterwards; to load "
            "weights into the existing parameters, call load_state_dict() without assign=True."
        )
    for p in params[len(known) :]:
        if id(p) not in names:
            raise UsageError(
                f"A tensor of shape {tuple(p.shape)} was added to a group by hand, but is not a parameter of the "
                "model: remove it."
            )
    return [names[id(p)] for p in params]


def refuse_shared_memory(trained: Mapping[str, Tensor]) -> None:
    """Raise if two of the parameters in `trained`, by name, share memory.

    Raises:
        UsageError: they do.
    """
    owner: dict[tuple[torch.device, int], str] = {}
    for name, p in trained.items():
        place = p.data_ptr() if p.layout is torch.strided and p.numel() else 0
        if place and (other := owner.setdefault((p.device, place), name)) != name:
            raise UsageError(
                f"Parameters {other!r} and {name!r} share memory (one was assigned to the .data of the other), so a "
                "draw of one would overwrite that of the other: share the parameter itself, as in decoder.weight = "
                "encoder.weight, before the optimizer is created."
            )


def refuse_resized(name: str, param: Tensor, kept: Iterable[Tensor]) -> None:
    """Raise if a parameter and its state have different shapes.

    Raises:
        UsageError: it has.
    """
    for value in kept:
        if param.shape != value.shape:
            raise UsageError(
                f"Parameter {name!r} has shape {tuple(param.shape)}, but its posterior has {tuple(value.shape)}: it "
                "was resized after the optimizer was created. Resize first and create the optimizer afterwards; pass "
                "what was learned so far, in the new shapes, as prior=."
            )


def warn_of_untrained(model: nn.Module, trained: Collection[Tensor], known: set[str]) -> None:
    """Warn once about each parameter that requires a gradient, but is not in `trained`.

    Args:
        model: the network.
        trained: the parameters of the optimizer.
        known: the names of those that were left out on purpose, or were warned of; new ones are added.
    """
    ids = {id(p) for p in trained}
    names = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in ids and n not in known]
    if not names:
        return
    known.update(names)
    shown = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} others" if len(names) > 3 else "")
    warn(
        f"The model has parameters that require a gradient, but are in no group of the optimizer: {shown}. They were "
        "frozen or missing when it was created, and are neither drawn nor trained. Add them by "
        'optimizer.add_param_group({"params": [...]}), or freeze them.',
        UntrainedParameterWarning,
    )
