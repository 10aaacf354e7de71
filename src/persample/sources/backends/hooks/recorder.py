"""Recording what the user runs, by the rules of this backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from persample.sources.backends.contributions import Contribution
from persample.sources.backends.hooks.counting import UseCounter
from persample.sources.backends.hooks.sums import HookBlocks, HookSums
from persample.sources.model.module_calls import ModuleCall
from persample.sources.recording.forward_pass import ForwardPass
from persample.sources.recording.layer_recorder import CallRecorder
from persample.sources.recording.results import LossReduction, Sums, Wanted
from persample.sources.selfcheck.rounds import Reading
from persample.sources.source import PerSampleGradSource


class HooksRecorder(CallRecorder):
    """Sums the contributions of the layers as the gradients at their outputs arrive."""

    def __init__(
        self, source: PerSampleGradSource, modules: Mapping[str, nn.Module], reduction: LossReduction, wanted: Wanted
    ) -> None:
        super().__init__(source, modules, reduction, wanted)
        self._passes: dict[ForwardPass, tuple[UseCounter, HookSums, HookBlocks, Reading]] = {}

    def begin(self, forward_pass: ForwardPass) -> None:
        super().begin(forward_pass)
        parameters, reading = self.recorded.parameters, self.reading(forward_pass)
        sums = HookSums(parameters, exact=self.source.exact)
        blocks = HookBlocks(parameters, forward_pass.batch.size, reading.receive)
        self._passes[forward_pass] = UseCounter(parameters), sums, blocks, reading

    def expect(self, forward_pass: ForwardPass, call: ModuleCall) -> None:
        self._passes[forward_pass][0].expect(call)

    def receive(self, forward_pass: ForwardPass, call: ModuleCall, delta: Tensor) -> None:
        uses, sums, blocks, _ = self._passes[forward_pass]

        def receive(name: str, contribution: Contribution, times: int) -> None:
            sums.receive(name, contribution, times)
            if self.recorded.wanted.quantities:
                blocks.receive(name, contribution, times)

        uses.give(call, delta, receive)

    def sums(self, forward_pass: ForwardPass) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        sums = self._passes[forward_pass][1]
        sums.finish()
        return sums.total, sums.squares

    def after_backward(self, forward_pass: ForwardPass) -> Sums:
        found = super().after_backward(forward_pass)
        _, _, blocks, reading = self._passes.pop(forward_pass)
        blocks.finish()
        self._found = reading.results()
        return found

    def quantities(self, forward_pass: ForwardPass) -> Sequence[Any]:
        return self._found
