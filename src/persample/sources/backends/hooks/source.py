"""The paper's method: forward hooks for the inputs, tensor hooks for the gradients at the outputs, rules for layers.

Jain and Khan, "Natural-Gradient Variational Inference for Bayesian Convolutional Neural Networks", section 3: from the
input a of a layer and the gradient δ at its output (before the activation) follow the gradients of the single
samples. The backward pass here stops at the outputs of the layers; autograd never computes a weight's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from persample.dtypes import without_autocast
from persample.errors import OptionError, UnsupportedModelError
from persample.moments import Moments
from persample.sources.backends.contributions import Contribution
from persample.sources.backends.hooks.counting import Receive, UseCounter, contributions_of
from persample.sources.backends.hooks.recorder import HooksRecorder
from persample.sources.backends.hooks.rules import modules_with_rules, reason_against
from persample.sources.backends.hooks.sums import HookBlocks, HookSums, zeros
from persample.sources.backends.layer_usage import uses_of_layers
from persample.sources.batch import Batch
from persample.sources.contract import Check
from persample.sources.contract import Receive as ReceiveBlock
from persample.sources.model.autograd_graph import outer_backward
from persample.sources.model.module_calls import (
    ModuleCall,
    recorded_calls,
    refuse_lists,
    refuse_unseen_uses,
    require_batch_first,
)
from persample.sources.model.refusals import VMAP_OR_VJP
from persample.sources.model.usage import Use
from persample.sources.recording.results import LossReduction, Wanted
from persample.sources.selfcheck.oracle import gradients_at
from persample.sources.source import PerSampleGradSource

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

    ordinary_state = True

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
            for contribution in contributions_of(call, delta, rows).values():
                contribution.per_sample()

        def refuse_gradient(delta: Tensor) -> None:
            raise _inner_gradient()

        def on_call(call: ModuleCall) -> None:
            call.origin.register_hook(refuse_gradient)  # no backward pass but one of the model's own follows

        return uses_of_layers(self, batch, reason_against, try_rule, on_call)

    def compute_per_sample(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        gradients = {name: zeros(p, batch.size) for name, p in self.parameters().items()}

        def receive(name: str, contribution: Contribution, uses: int) -> None:
            gradients[name] += contribution.per_sample()

        return self._backward(batch, receive), self._in_own_dtype(gradients)

    def compute_moments(self, batch: Batch) -> Moments:
        sums = HookSums(self.parameters(), exact=self.exact)
        losses = self._backward(batch, sums.receive)
        sums.finish()
        return Moments(
            losses=losses,
            mean=self._in_own_dtype({name: value / batch.size for name, value in sums.total.items()}),
            second_moment=self._in_own_dtype({name: value / batch.size for name, value in sums.squares.items()}),
        )

    def compute_blocks(self, batch: Batch, receive: ReceiveBlock, max_bytes: int) -> Tensor:
        blocks = HookBlocks(self.parameters(), batch.size, receive)
        losses = self._backward(batch, blocks.receive)
        with without_autocast(losses.device):
            blocks.finish()
        return losses

    def samples_at_once(self, batch: Batch, max_bytes: int) -> int:
        return batch.size

    def recorder(self, loss_reduction: LossReduction, wanted: Wanted) -> HooksRecorder:
        return HooksRecorder(self, modules_with_rules(self.model), loss_reduction, wanted)

    def _backward(self, batch: Batch, receive: Receive) -> Tensor:
        """Run forward and backward once; pass contributions to `receive`, with parameter name and number of uses.

        Returns:
            The detached losses.
        """
        refuse_lists(batch)
        parameters = self.parameters()
        uses = UseCounter(parameters)
        handles: list[RemovableHandle] = []
        in_outer_backward: Callable[[], bool] | None = None  # None as long as the forward pass runs

        def on_call(call: ModuleCall) -> None:
            require_batch_first(call, batch)
            uses.expect(call)
            # Registered before anything can change the output in place, so δ belongs to the output as it is now.
            shape = call.output.shape

            def take(delta: Tensor) -> None:
                if in_outer_backward is None:
                    raise _inner_gradient()
                if in_outer_backward():
                    uses.give(call, delta.reshape(shape), receive)

            handles.append(call.origin.register_hook(take))

        try:
            with recorded_calls(modules_with_rules(self.model), on_call) as calls:
                losses = self.losses(batch)
            refuse_unseen_uses(losses, calls, parameters)
            with outer_backward([losses]) as in_outer_backward:
                gradients_at([call.edge for call in calls], losses, parameters)
        finally:
            # A hook holds its call, the call the tensor, and the tensor the hook: a circle that nothing else breaks.
            for handle in handles:
                handle.remove()
        return losses.detach()

    def _in_own_dtype(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: values[name].to(p.dtype) for name, p in self.parameters().items()}


def _inner_gradient() -> UnsupportedModelError:
    return UnsupportedModelError(
        "The model or the loss computes gradients itself (torch.autograd.grad in the forward pass), which backend "
        f"'hooks' would mistake for those of the losses: {VMAP_OR_VJP}."
    )
