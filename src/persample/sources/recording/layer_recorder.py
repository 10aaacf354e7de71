"""Recording for the backends that work layer by layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from persample.errors import UsageError
from persample.sources.contract import Contract
from persample.sources.model.module_calls import (
    ModuleCall,
    recorded_calls,
    refuse_lists,
    refuse_unseen_uses,
    require_batch_first,
)
from persample.sources.model.refusals import refuse_impossible
from persample.sources.recording.forward_pass import ForwardPass
from persample.sources.recording.recorder import Recorder
from persample.sources.recording.reduction import refuse_uses_past_outputs
from persample.sources.recording.results import LossReduction, Sums, Wanted
from persample.sources.selfcheck.tolerances import Allowance, read
from persample.sources.selfcheck.verify import require_close


class CallRecorder(Recorder):
    """Records the calls of layers in the user's forward pass, and the gradients at their outputs in the backward pass.

    The gradients of the parameters are those of autograd. Where the backend knows their sums too, they are compared.

    Args:
        source: the backend.
        modules: the layers that own parameters, by path.
        reduction: how the user reduces the losses.
        wanted: the quantities that are wanted, beside the moments.
    """

    def __init__(
        self,
        source: Contract,
        modules: Mapping[str, nn.Module],
        reduction: LossReduction,
        wanted: Wanted = Wanted(),  # noqa: B008 - it cannot be changed
    ) -> None:
        super().__init__(source.model, source.parameters(), reduction, wanted)
        self.source = source
        self.calls: dict[ForwardPass, list[ModuleCall]] = {}
        self._modules = modules
        self._recording = ExitStack()
        self._all_calls: list[ModuleCall] = []
        self._allowance = Allowance(0.0, torch.float64, 0.0)

    # What a backend implements.

    def expect(self, forward_pass: ForwardPass, call: ModuleCall) -> None:
        """Record a call in the forward pass."""

    @abstractmethod
    def receive(self, forward_pass: ForwardPass, call: ModuleCall, delta: Tensor) -> None:
        """Receive the gradient of the loss at the output of a call."""

    @abstractmethod
    def sums(self, forward_pass: ForwardPass) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return Σ_i row_i of the parameters for which it is known, and Σ_i row_i² of all, by name."""

    # What the recorder calls.

    def __enter__(self) -> CallRecorder:
        self._all_calls = self._recording.enter_context(recorded_calls(self._modules, self._on_call))
        super().__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        with self._recording:
            super().__exit__(kind, error, traceback)

    def begin(self, forward_pass: ForwardPass) -> None:
        refuse_impossible(self.model)
        self.source.refuse_hooks()
        self.remember_state(self.source, forward_pass)
        refuse_lists(forward_pass.batch)
        self.calls = {forward_pass: []}

    def before_backward(self, losses: Sequence[Tensor]) -> AbstractContextManager[Any]:
        calls = [call for calls in self.calls.values() for call in calls]
        self.refuse_unseparable(losses, self.source)
        with torch._C.DisableTorchFunction():
            edges = [edge for p in self.passes[-1:] for edge in p.edges.values()] + [call.edge for call in calls]
            for loss in losses:
                refuse_uses_past_outputs(loss, edges, self.recorded.parameters)
                refuse_unseen_uses(loss, calls, self.recorded.parameters)
                self._allowance = Allowance.of(loss)
        return self.with_gradients()

    def after_backward(self, forward_pass: ForwardPass) -> Sums:
        with torch._C.DisableTorchFunction():
            total, squares = self.sums(forward_pass)
            self._check(total)
        self._forget(forward_pass)
        self._check_layers(forward_pass)
        return Sums(forward_pass.batch.size, self.gradients, squares)

    # Inner workings.

    def _on_call(self, call: ModuleCall) -> None:
        forward_pass = self.current
        if forward_pass is None or not self.watches_calls:
            return
        with torch._C.DisableTorchFunction():
            require_batch_first(call, forward_pass.batch)
            self.calls[forward_pass].append(call)
            self.expect(forward_pass, call)
            shape = call.output.shape

            def on_gradient(delta: Tensor) -> None:
                if not self.watches_gradients:
                    return
                self.reach(forward_pass)
                with torch._C.DisableTorchFunction():
                    self.receive(forward_pass, call, delta.reshape(shape))

            # Registered before anything can change the output in place, so δ belongs to the output as it is now.
            self.hold(call.origin.register_hook(on_gradient))

    def _forget(self, forward_pass: ForwardPass) -> None:
        # A hook holds its call, the call the tensor, and the tensor the hook: a circle that nothing else breaks.
        done = self.calls.pop(forward_pass)
        self._all_calls[:] = [call for call in self._all_calls if call not in done]

    def _check_layers(self, forward_pass: ForwardPass) -> None:
        """Check that the samples are where the layers' rules expect them."""
        if not forward_pass.outputs and self.source.check != "never":
            raise UsageError(
                f"The model returned no tensor with the samples in dim 0, so {type(self.source).__name__} cannot check "
                "itself: return the outputs beside the loss, or use optimizer.observe(inputs, targets), or backend "
                "'fused'."
            )
        self.check(self.source, forward_pass)

    def _check(self, total: Mapping[str, Tensor]) -> None:
        if self.source.check == "never":
            return
        ordinary = {name: g for name, g in self.gradients.items() if name in total}
        if all(read([g.isfinite().all() for g in ordinary.values()])):  # else a gradient scaler will skip the step
            claimed = {name: total[name] for name in ordinary}
            require_close(self.source, "sum of the per-sample gradients", claimed, ordinary, self._allowance)
