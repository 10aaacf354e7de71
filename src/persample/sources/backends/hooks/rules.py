"""Which layer has which rule, and which layers this backend refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from persample.errors import UnsupportedModelError
from persample.frozen_batch_norm import FrozenBatchNorm
from persample.sources.backends.contributions import Contribution
from persample.sources.backends.hooks.convolution import (
    CONVOLUTIONS,
    TRANSPOSED_CONVOLUTIONS,
    convolution,
    transposed_convolution,
)
from persample.sources.backends.hooks.embedding import embedding
from persample.sources.backends.hooks.linear import linear
from persample.sources.backends.hooks.normalization import batch_or_instance_norm, group_norm, layer_norm, rms_norm
from persample.sources.model.refusals import FUSED_OR_VJP, describe, foreign_parameters

#: `rule(module, input, delta)` with δ the gradient of the summed loss at the module's output.
Rule = Callable[[Any, Tensor, Tensor], dict[str, Contribution]]

RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear,
    **dict.fromkeys(CONVOLUTIONS, convolution),
    **dict.fromkeys(TRANSPOSED_CONVOLUTIONS, transposed_convolution),
    nn.Embedding: embedding,
    nn.LayerNorm: layer_norm,
    nn.RMSNorm: rms_norm,
    nn.GroupNorm: group_norm,
    nn.InstanceNorm1d: batch_or_instance_norm,
    nn.InstanceNorm2d: batch_or_instance_norm,
    nn.InstanceNorm3d: batch_or_instance_norm,
    nn.BatchNorm1d: batch_or_instance_norm,
    nn.BatchNorm2d: batch_or_instance_norm,
    nn.BatchNorm3d: batch_or_instance_norm,
    FrozenBatchNorm: batch_or_instance_norm,
}


def modules_with_rules(model: nn.Module) -> dict[str, nn.Module]:
    """Return, by path, the modules that own parameters which require a gradient: each has a rule.

    Raises:
        UnsupportedModelError: one has none; it is named with the reason.
    """
    found = {}
    for path, module in model.named_modules():
        if not any(p is not None and p.requires_grad for p in module._parameters.values()):
            continue
        reason = reason_against(module)
        if reason:
            raise UnsupportedModelError(f"{describe(path, module)} {reason} {FUSED_OR_VJP.capitalize()}.")
        found[path] = module
    return found


def reason_against(module: nn.Module) -> str | None:
    """Return why no rule is right for `module`, as a sentence without its subject; None if one is."""
    kind = type(module)
    if kind not in RULES:
        base = next((known.__name__ for known in kind.__mro__ if known in RULES), None)
        if base is not None:
            return (
                f"is a subclass of {base}: backend 'hooks' has rules for exact classes only, because a subclass may "
                "compute something else."
            )
        return "has parameters of its own, and backend 'hooks' has no rule for it."
    if "forward" in vars(module):
        return "has its own forward, set on the instance, which the rule for its class ignores."
    if reason := foreign_parameters(module):
        return f"{reason}."
    return None
