"""Finding the uses of parameters, for the backends that work layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from persample.errors import UnsupportedModelError
from persample.sources.batch import Batch
from persample.sources.model.autograd_graph import nodes_behind
from persample.sources.model.module_calls import (
    ModuleCall,
    recorded_calls,
    refuse_changed_inputs,
    refuse_lists,
    require_batch_first,
    unseen_uses,
)
from persample.sources.model.refusals import FUSED_OR_VJP, describe
from persample.sources.model.state import state_restored
from persample.sources.model.usage import Kind, Use
from persample.sources.selfcheck.oracle import losses_of_part
from persample.sources.source import PerSampleGradSource


def uses_of_layers(
    source: PerSampleGradSource,
    batch: Batch | None,
    reason_against: Callable[[nn.Module], str | None],
    try_rule: Callable[[ModuleCall, Tensor], object],
    on_call: Callable[[ModuleCall], None] = lambda call: None,
) -> Iterator[Use]:
    """Yield the uses of the parameters of `source`, a backend with rules for layers.

    Args:
        source: the backend.
        batch: the batch; None to go by what can be seen without one.
        reason_against: returns why there is no rule for a module that owns parameters, or None.
        try_rule: applies the rule to a call, given δ.
        on_call: is given each call of the forward pass.
    """
    names = {id(p): name for name, p in source.parameters().items()}
    layers: dict[str, nn.Module] = {}
    refused: set[str] = set()
    for path, module in source.model.named_modules():
        own = _names_in(module, names)
        reason = reason_against(module) if own else None
        if reason:
            why = f"{describe(path, module)} {reason} {FUSED_OR_VJP.capitalize()}."
            refused.update(own)
            yield from (Use(name, "refused", type(module).__name__, path, why) for name in own)
        elif own:
            layers[path] = module
            if batch is None:
                yield from (Use(name, "rule", type(module).__name__, path) for name in own)
    if batch is None:
        return
    refuse_lists(batch)
    with recorded_calls(layers, on_call) as calls:
        losses = source.losses(batch)
    reached = nodes_behind(losses)
    reasons = _reasons_in_another_batch(source, batch, layers)
    for call in calls:
        if call.edge.node in reached:
            why = _reason_against_call(call, batch, try_rule) or reasons.get(call.path, "")
            kind: Kind = "refused" if why else "rule"
            own = _names_in(call.module, names)
            yield from (Use(name, kind, type(call.module).__name__, call.path, why) for name in own)
    for name, why in unseen_uses(losses, calls, source.parameters()):
        if name not in refused:
            yield Use(name, "refused", "outside the calls of layers" if name else "the model", "", why)


def _names_in(module: nn.Module, names: dict[int, str]) -> list[str]:
    """Return the names, in the model, of the trained parameters that `module` itself holds."""
    return [names[id(p)] for p in module._parameters.values() if id(p) in names]


def _reasons_in_another_batch(
    source: PerSampleGradSource, batch: Batch, layers: Mapping[str, nn.Module]
) -> dict[str, str]:
    """Return, by path, why calls of layers are refused in a batch with one sample less.

    There another dimension that is as long as the batch by chance does not pass for the samples.
    """
    fewer = batch.take(slice(0, batch.size - 1))
    reasons: dict[str, str] = {}
    if fewer.size:
        with state_restored(source.state()), recorded_calls(layers) as calls:
            losses_of_part(source, fewer)
        for call in calls:
            try:
                require_batch_first(call, fewer)
            except UnsupportedModelError as refusal:
                reasons[call.path] = str(refusal)
    return reasons


def _reason_against_call(call: ModuleCall, batch: Batch, try_rule: Callable[[ModuleCall, Tensor], object]) -> str:
    try:
        require_batch_first(call, batch)
        refuse_changed_inputs(call)
        with torch.no_grad():
            try_rule(call, torch.zeros_like(call.output))
    except UnsupportedModelError as refusal:
        return str(refusal)
    return ""
