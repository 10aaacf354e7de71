"""The paper's method: forward hooks for the inputs, tensor hooks for the gradients at the outputs, rules for layers.

Jain and Khan, "Natural-Gradient Variational Inference for Bayesian Convolutional Neural Networks", section 3: from the
input a of a layer and the gradient δ at its output (before the activation) follow the gradients of the single
samples. The backward pass here stops at the outputs of the layers; autograd never computes a weight's gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from persample.errors import OptionError
from persample.moments import Moments
from persample.sources.base import Check, PerSampleGradSource
from persample.sources.batch import Batch
from persample.sources.contributions import Contribution, precise, without_autocast
from persample.sources.hooks.rules import RULES, modules_with_rules, reason_against
from persample.sources.layer_uses import uses_of_layers
from persample.sources.module_calls import (
    ModuleCall,
    recorded_calls,
    refuse_changed_inputs,
    refuse_unseen_uses,
    require_batch_first,
)
from persample.sources.use import Use

Curvature = Literal["exact", "printed"]


class HooksSource(PerSampleGradSource):
    """Per-sample gradients by hooks and hand-written rules.

    Args:
        model: the network.
        loss_fn: the loss of each sample.
        curvature: `"exact"` is Σ_i g_i². `"printed"` is the formula printed in the paper, ([[A]])² × G², which
            squares before the sum over the positions of a convolution (or a sequence) and so drops the cross terms:
            an approximation, often several times too small. It changes `second_moment` only.
        check: when the self-check runs, see `PerSampleGradSource`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Any],
        *,
        curvature: Curvature = "exact",
        check: Check = "first",
    ) -> None:
        super().__init__(model, loss_fn, check=check)
        if curvature not in get_args(Curvature):
            raise OptionError(
                f"curvature={curvature!r} is not known: use one of {', '.join(map(repr, get_args(Curvature)))}."
            )
        self.exact = curvature == "exact"

    def refuse_unsupported(self) -> None:
        modules_with_rules(self.model)

    def find_uses(self, batch: Batch | None) -> Iterable[Use]:
        def try_rule(call: ModuleCall, delta: Tensor) -> None:
            rows = slice(0, 1)
            for contribution in _contributions(call, delta, rows).values():
                contribution.per_sample()

        return uses_of_layers(self, batch, reason_against, try_rule)

    def compute_per_sample(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        gradients = {name: _zeros(p, batch.size) for name, p in self.parameters().items()}

        def receive(name: str, contribution: Contribution, uses: int) -> None:
            gradients[name] += contribution.per_sample()

        return self._backward(batch, receive), self._in_own_dtype(gradients)

    def compute_moments(self, batch: Batch) -> Moments:
        total = {name: _zeros(p) for name, p in self.parameters().items()}
        squares = {name: _zeros(p) for name, p in self.parameters().items()}
        shared: dict[str, Tensor] = {}

        def receive(name: str, contribution: Contribution, uses: int) -> None:
            if not self.exact:
                total[name] += contribution.sums()[0]
                squares[name] += contribution.printed_second_moment_sum()
            elif uses == 1:
                total[name], squares[name] = contribution.sums()
            else:
                # All uses of a parameter are added up for each sample before they are squared.
                shared[name] = shared.get(name, 0) + contribution.per_sample()

        losses = self._backward(batch, receive)
        for name, g in shared.items():
            total[name], squares[name] = g.sum(0), g.square().sum(0)
        return Moments(
            losses=losses,
            mean=self._in_own_dtype({name: value / batch.size for name, value in total.items()}),
            second_moment=self._in_own_dtype({name: value / batch.size for name, value in squares.items()}),
        )

    def _backward(self, batch: Batch, receive: Callable[[str, Contribution, int], None]) -> Tensor:
        """Run forward and backward once; give `receive` each contribution with its parameter's name and number of uses.

        Returns:
            The detached losses.
        """
        parameters = self.parameters()
        names = {id(p): name for name, p in parameters.items()}
        uses: Counter[str] = Counter()
        handles: list[RemovableHandle] = []

        def used_parameters(module: nn.Module) -> dict[str, str]:
            """Names in the model by names in the module."""
            own = module._parameters.items()
            return {local: names[id(p)] for local, p in own if p is not None and id(p) in names}

        def on_call(call: ModuleCall) -> None:
            require_batch_first(call, batch.size)
            uses.update(used_parameters(call.module).values())
            # Registered before anything can change the output in place, so δ belongs to the output as it is now.
            shape = call.output.shape
            handles.append(call.origin.register_hook(lambda delta: on_gradient(call, delta.reshape(shape))))

        def on_gradient(call: ModuleCall, delta: Tensor) -> None:
            refuse_changed_inputs(call)
            with without_autocast(delta.device):
                contributions = _contributions(call, delta)
                for local, name in used_parameters(call.module).items():
                    receive(name, contributions[local], uses[name])

        try:
            with recorded_calls(modules_with_rules(self.model), on_call) as calls:
                losses = self.losses(batch)
            refuse_unseen_uses(losses, calls, parameters)
            if calls and losses.requires_grad:
                torch.autograd.grad(losses.sum(), [call.edge for call in calls], allow_unused=True)
        finally:
            # A hook holds its call, the call the tensor, and the tensor the hook: a circle that nothing else breaks.
            for handle in handles:
                handle.remove()
        return losses.detach()

    def _in_own_dtype(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: values[name].to(p.dtype) for name, p in self.parameters().items()}


def _contributions(call: ModuleCall, delta: Tensor, rows: slice = slice(None)) -> dict[str, Contribution]:
    """Return what the rule for a layer gives for its parameters, by their names in it, from some of the samples."""
    a = precise(call.inputs[0])
    return RULES[type(call.module)](call.module, a[rows], precise(delta)[rows])


def _zeros(parameter: Tensor, *leading: int) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros((*leading, *parameter.shape), dtype=dtype, device=parameter.device)
