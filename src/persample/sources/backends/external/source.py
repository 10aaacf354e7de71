"""`PeerSource`: another package as a backend, by its own machinery or by its rules for single layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from persample.errors import OptionError, UnsupportedModelError
from persample.moments import Moments
from persample.sources.backends.external.layer_rules import PeerRulesSource
from persample.sources.backends.external.machinery import BusyError, PeerMachinerySource, UnfitError
from persample.sources.batch import Batch
from persample.sources.contract import Check, Receive
from persample.sources.model.refusals import FUSED_OR_VJP
from persample.sources.model.state import State, state_restored
from persample.sources.model.usage import Use
from persample.sources.recording.recorder import Recorder
from persample.sources.recording.results import LossReduction, Wanted
from persample.sources.source import PerSampleGradSource

Result = TypeVar("Result")


class PeerSource(PerSampleGradSource):
    """Per-sample gradients by another package, by its machinery or by its rules for single layers.

    Attributes:
        machinery: the option: the name of the machinery, `"rules"`, or `"auto"`.
        ran: which of the two served the last call, or the last `explain`; None before.
        ran_because: with `"auto"`, why that was not the machinery; empty if it was.
        norms_by: by parameter, what gave the norms of its gradients when quantities were last taken by the rules, or
            would, after `explain`: the package's own rule for norms, or the gradients, and why.
    """

    #: What the option calls the machinery.
    own: ClassVar[str]
    by_machinery: ClassVar[type[PeerMachinerySource]]
    by_rules: ClassVar[type[PeerRulesSource]]

    def __init__(
        self, model: nn.Module, loss_fn: Callable[[Any, Any], Any], *, check: Check = "first", machinery: str = "auto"
    ) -> None:
        super().__init__(model, loss_fn, check=check)
        known = ("auto", self.own, "rules")
        if machinery not in known:
            raise OptionError(f"machinery={machinery!r} is not known: use one of {', '.join(map(repr, known))}.")
        self.machinery = machinery
        self.norms_by = {}
        self._found: dict[tuple[Any, ...], str] = {}
        self._moved_attributes = False  # whether the stand-in of the last call has other attributes than the model

    def refuse_unsupported(self) -> None:
        if self.machinery == "rules" or self._known_reason():
            self._rules().refuse_unsupported()

    def compute_per_sample(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self._served(batch, lambda source: source.compute_per_sample(batch))

    def compute_moments(self, batch: Batch) -> Moments:
        return self._served(batch, lambda source: source.compute_moments(batch))

    def compute_blocks(self, batch: Batch, receive: Receive, max_bytes: int) -> Tensor:
        if not self._quantities_by_rules():
            return super().compute_blocks(batch, receive, max_bytes)
        self.ran, self._moved_attributes = "rules", False
        self.ran_because = "" if self.machinery == "rules" else "Quantities are taken from single layers."
        rules = self._rules()
        self.norms_by = rules.norms_by
        return rules.compute_blocks(batch, receive, max_bytes)

    def samples_at_once(self, batch: Batch, max_bytes: int) -> int:
        return batch.size if self._quantities_by_rules() else super().samples_at_once(batch, max_bytes)

    def find_uses(self, batch: Batch | None) -> Iterable[Use]:
        if self.machinery == self.own:
            reasons = [str(self._advised(UnfitError(reason))) for reason in self._machinery().known_reasons()]
            if reasons:
                return [Use(None, "refused", "the model", "", reason) for reason in reasons]
        uses = self._served(batch, lambda source: list(source.find_uses(batch)))
        if batch is not None and self._quantities_by_rules() and all(use.kind != "refused" for use in uses):
            with state_restored(self.state()):
                self.norms_by = self._rules().find_norms(batch)
        return uses

    def recorder(self, loss_reduction: LossReduction, wanted: Wanted) -> Recorder:
        """Return what records passes that the user runs.

        The rules are applied to the user's own pass. The machinery, whose hooks are not on the user's model, repeats
        it; with `machinery="auto"` only where the rules do not serve the model.
        """
        if self._quantities_by_rules():
            self.ran = "rules"
            rules = self._rules()
            self.norms_by = rules.norms_by
            return rules.recorder(loss_reduction, wanted)
        self.ran = self.own
        return super().recorder(loss_reduction, wanted)

    def state_changed(self, state: State) -> bool:
        return self._moved_attributes or super().state_changed(state)

    # Inner workings.

    def _served(self, batch: Batch | None, compute: Callable[[PerSampleGradSource], Result]) -> Result:
        """Return the result of `compute` for the machinery or the rules, whichever serves `batch`."""
        self.ran_because = self._known_reason() or self._found_reason(batch)
        if self.machinery != "rules" and not self.ran_because:
            self.ran = self.own
            machinery = self._machinery()
            try:
                result = compute(machinery) if batch is None else machinery.attempt(batch, compute)
                self._moved_attributes = machinery.moved_attributes
                return result
            except UnsupportedModelError as refusal:
                if self.machinery == self.own or not self._rules_serve():
                    raise self._advised(refusal) from refusal
                self.ran_because = str(refusal)
                if batch is not None and not isinstance(refusal, BusyError):
                    self._found[self.kind_of(batch, self.own)] = self.ran_because
        self.ran, self._moved_attributes = "rules", False
        return compute(self._rules())

    def _known_reason(self) -> str:
        """Return why the machinery cannot serve the model, as far as known before it runs; empty if it may.

        Raises:
            UnsupportedModelError: something is, and no other may serve.
        """
        reason = "" if self.machinery == "rules" else next(self._machinery().known_reasons(), "")
        if reason and self.machinery == self.own:
            raise self._advised(UnfitError(reason))
        return reason

    def _found_reason(self, batch: Batch | None) -> str:
        """Return why it cannot, as a forward pass on a batch of this kind has shown."""
        return self._found.get(self.kind_of(batch, self.own), "") if self._found and batch is not None else ""

    def _advised(self, refusal: UnsupportedModelError) -> UnsupportedModelError:
        """Return `refusal` with advice appended."""
        if not isinstance(refusal, UnfitError):
            return refusal
        rules = "use machinery='rules', or " if self._rules_serve() else ""
        return UnsupportedModelError(f"{refusal} {(rules + FUSED_OR_VJP).capitalize()}.")

    def _quantities_by_rules(self) -> bool:
        return self.machinery == "rules" or (self.machinery == "auto" and self._rules_serve())

    def _rules_serve(self) -> bool:
        try:
            self._rules().refuse_unsupported()
        except UnsupportedModelError:
            return False
        return True

    def _machinery(self) -> PeerMachinerySource:
        return self.by_machinery(self.model, self.loss_fn, check=self.check)

    def _rules(self) -> PeerRulesSource:
        rules = self.by_rules(self.model, self.loss_fn, check=self.check)
        rules.checked = self.checked  # a recording runs the self-check by itself
        return rules
