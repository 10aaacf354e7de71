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
from persample.sources.recording.results import LossReduction, Wanted
from persample.sources.selfcheck.rounds import Reading
from persample.sources.source import PerSampleGradSource


class HooksRecorder(CallRecorder):
    """Sums the contributions of the layers as the gradients at their outputs arrive.

    Where quantities are wanted, the sums are those of the blocks that these read, so that nothing is added up twice.
    """

    def __init__(
        self, source: PerSampleGradSource, modules: Mapping[str, nn.Module], reduction: LossReduction, wanted: Wanted
    ) -> None:
        super().__init__(source, modules, reduction, wanted)
        self._uses = UseCounter({})
        self._sums: HookSums | None = None
        self._blocks: HookBlocks | None = None
        self._reading: Reading | None = None

    def begin(self, forward_pass: ForwardPass) -> None:
        super().begin(forward_pass)
        parameters, exact = self.recorded.parameters, self.source.exact
        self._uses, self._reading = UseCounter(parameters), self.reading(forward_pass, sums=exact)
        self._sums = HookSums(parameters, exact=exact) if self._reading is None or not exact else None
        self._blocks = (
            None if self._reading is None else HookBlocks(parameters, forward_pass.batch.size, self._reading.receive)
        )

    def expect(self, forward_pass: ForwardPass, call: ModuleCall) -> None:
        self._uses.expect(call)

    def receive(self, forward_pass: ForwardPass, call: ModuleCall, delta: Tensor) -> None:
        def receive(name: str, contribution: Contribution, times: int) -> None:
            for each in (self._sums, self._blocks):
                if each is not None:
                    each.receive(name, contribution, times)

        self._uses.give(call, delta, receive)

    def sums(self, forward_pass: ForwardPass) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        for each in (self._sums, self._blocks):
            if each is not None:
                each.finish()
        found = self._sums or self._reading
        assert found is not None
        return found.total, found.squares

    def quantities(self, forward_pass: ForwardPass) -> Sequence[Any]:
        return () if self._reading is None else self._reading.results()
