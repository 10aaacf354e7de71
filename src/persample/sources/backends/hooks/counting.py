"""Counting the uses of each parameter in a forward pass, and forwarding their contributions in the backward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TypeAlias

from torch import Tensor, nn

from persample.dtypes import without_autocast
from persample.sources.backends.contributions import Contribution, precise
from persample.sources.backends.hooks.rules import RULES
from persample.sources.model.module_calls import ModuleCall, refuse_changed_inputs

#: Takes the name of a parameter, a contribution to its gradients, and how many contributions there will be.
Receive: TypeAlias = Callable[[str, Contribution, int], None]


class UseCounter:
    """The uses of parameters by the layers that were called.

    Args:
        parameters: by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._names = {id(p): name for name, p in parameters.items()}
        self._count: Counter[str] = Counter()

    def expect(self, call: ModuleCall) -> None:
        """Count a call of a layer."""
        self._count.update(self._used(call.module).values())

    def give(self, call: ModuleCall, delta: Tensor, receive: Receive) -> None:
        """Pass the contributions of a call, with gradient δ at its output, to `receive`."""
        refuse_changed_inputs(call)
        with without_autocast(delta.device):
            contributions = contributions_of(call, delta)
            for local, name in self._used(call.module).items():
                receive(name, contributions[local], self._count[name])

    def _used(self, module: nn.Module) -> dict[str, str]:
        """Names in the model by names in the module."""
        own = module._parameters.items()
        return {local: self._names[id(p)] for local, p in own if p is not None and id(p) in self._names}


def contributions_of(call: ModuleCall, delta: Tensor, rows: slice = slice(None)) -> dict[str, Contribution]:
    """Return a layer's contributions by its rule, by parameter name in the layer, from some of the samples."""
    a = precise(call.inputs[0])
    return RULES[type(call.module)](call.module, a[rows], precise(delta)[rows])
