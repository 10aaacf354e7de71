"""Recording what the user runs, by the rules of this backend."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from persample.sources.backends.hooks.counting import UseCounter
from persample.sources.backends.hooks.sums import HookSums
from persample.sources.model.module_calls import ModuleCall
from persample.sources.recording.forward_pass import ForwardPass
from persample.sources.recording.layer_recorder import CallRecorder
from persample.sources.recording.results import LossReduction
from persample.sources.source import PerSampleGradSource


class HooksRecorder(CallRecorder):
    """Adds up the contributions of the layers as soon as the gradients at their outputs arrive."""

    def __init__(self, source: PerSampleGradSource, modules: Mapping[str, nn.Module], reduction: LossReduction) -> None:
        super().__init__(source, modules, reduction)
        self._passes: dict[ForwardPass, tuple[UseCounter, HookSums]] = {}

    def begin(self, forward_pass: ForwardPass) -> None:
        super().begin(forward_pass)
        parameters = self.recorded.parameters
        self._passes[forward_pass] = UseCounter(parameters), HookSums(parameters, exact=self.source.exact)

    def expect(self, forward_pass: ForwardPass, call: ModuleCall) -> None:
        self._passes[forward_pass][0].expect(call)

    def receive(self, forward_pass: ForwardPass, call: ModuleCall, delta: Tensor) -> None:
        uses, sums = self._passes[forward_pass]
        uses.give(call, delta, sums.receive)

    def sums(self, forward_pass: ForwardPass) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        _, sums = self._passes.pop(forward_pass)
        sums.finish()
        return sums.total, sums.squares
