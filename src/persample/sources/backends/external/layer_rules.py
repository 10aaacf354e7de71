"""Rules for single layers, applied to the recorded calls of one pass: shared by the adapters of BackPACK and Opacus.

Both packages know, for a layer with input a and the gradient δ of the summed loss at its output, the gradients of the
single samples. Their machinery around these rules (hooks in both directions, attributes, counters, a global context)
breaks on operations in place, in eval mode, on layers that are used twice, and between threads. So here one forward
and one backward pass give a and δ of every call, and the package gives what its rule makes of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from persample.dtypes import without_autocast
from persample.errors import UnsupportedModelError
from persample.quantities.block import Block
from persample.sources.backends.contributions import precise
from persample.sources.backends.external.layer_gradients import LayerCall, LayerGradients, cancels, positions, trainable
from persample.sources.backends.layer_usage import uses_of_layers
from persample.sources.batch import Batch
from persample.sources.contract import Check
from persample.sources.contract import Receive as ReceiveBlock
from persample.sources.model.autograd_graph import nodes_behind
from persample.sources.model.module_calls import (
    ModuleCall,
    recorded_calls,
    refuse_changed_inputs,
    refuse_lists,
    refuse_unseen_uses,
    require_batch_first,
)
from persample.sources.model.refusals import FUSED_OR_VJP, describe, foreign_parameters
from persample.sources.model.usage import Use
from persample.sources.recording.forward_pass import ForwardPass
from persample.sources.recording.layer_recorder import CallRecorder
from persample.sources.recording.results import LossReduction, Wanted
from persample.sources.selfcheck.oracle import gradients_at
from persample.sources.selfcheck.rounds import MAX_BYTES, Reading
from persample.sources.source import PerSampleGradSource

#: As many numbers of per-sample gradients of a parameter as are formed at once.
_AT_ONCE = 2**20

#: What a package computes for the parameters of a layer from one use of it.
Rule = Callable[[LayerCall], Mapping[nn.Parameter, Tensor]]


class PeerRulesSource(PerSampleGradSource):
    """Per-sample gradients by another package's rules for single layers.

    A subclass names the package, says which layers it has no right rule for, and applies its rule to one use.

    Attributes:
        norms_by: by parameter, what gave the norms of its gradients when they were last asked for: the package's own
            rule for norms, or the gradients and why not that rule.
    """

    #: How errors name the package, its rule for gradients and that for norms.
    package: ClassVar[str]
    by_gradients: ClassVar[str]
    by_norms: ClassVar[str]

    #: Whether its rule for norms forms the gradients, other than those of layers with one position.
    norms_form_gradients: ClassVar[bool]

    ordinary_state = True
    norms_by: dict[str, str]

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any, Any], Any], *, check: Check = "first") -> None:
        super().__init__(model, loss_fn, check=check)
        self.norms_by = {}

    @abstractmethod
    def reason_against(self, layer: nn.Module) -> str | None:
        """Return why the package has no exact rule for `layer`, a sentence without its subject; None if it has one."""

    @abstractmethod
    def rows(self, use: LayerCall) -> Mapping[nn.Parameter, Tensor]:
        """Return the package's per-sample gradients, `(B, *p.shape)`, of the layer's parameters."""

    @abstractmethod
    def reason_against_norms(self, use: LayerCall) -> str:
        """Return why the package's own norms are not right for the one trainable parameter of a call; empty if so.

        A sentence without its subject.
        """

    @abstractmethod
    def squared_norms(self, use: LayerCall) -> Mapping[nn.Parameter, Tensor]:
        """Return ‖g_i‖², `(B,)`, of the layer's parameters by the package's own rule for norms."""

    def own_squares(self, uses: Sequence[LayerCall], rows: int) -> Tensor | None:
        return None

    def own_weighted_sum(self, use: LayerCall, weights: Tensor) -> Tensor | None:
        return None

    def refuse_unsupported(self) -> None:
        self.layers()

    def find_uses(self, batch: Batch | None) -> Iterable[Use]:
        def try_rule(call: ModuleCall, delta: Tensor) -> None:
            self.by_rule(self.rows, _use(call, delta).take(slice(0, 2)))

        return uses_of_layers(self, batch, self.reason_against, try_rule)

    def compute_per_sample(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        losses, _, uses = self.backward(batch)
        rows = self.summed_rows(uses)
        return losses, {
            name: rows[p].to(p.dtype) if p in rows else p.new_zeros((batch.size, *p.shape))
            for name, p in self.parameters().items()
        }

    def compute_blocks(self, batch: Batch, receive: ReceiveBlock, max_bytes: int) -> Tensor:
        losses, _, uses = self.backward(batch)
        for block in self.blocks(uses, batch.size, max_bytes):
            receive(block)
        return losses

    def samples_at_once(self, batch: Batch, max_bytes: int) -> int:
        return batch.size

    def blocks(self, uses: Iterable[LayerCall], size: int, max_bytes: int = MAX_BYTES) -> Iterator[Block]:
        """Yield the gradients of each parameter in use, as what its calls give."""
        for name, p, calls in self._by_parameter(uses):
            most = max(1, max_bytes // (max(4, p.element_size()) * max(1, p.numel())))
            rows = max(1, min(most, _AT_ONCE // max(1, p.numel())))
            yield LayerGradients(name, 0, size, calls, self, rows, most)

    def find_norms(self, batch: Batch) -> dict[str, str]:
        """Return, by parameter, what would give the norms of its gradients, without computing any; see `norms_by`.

        Only where the gradients nearly cancel, which their values tell, it may be another.
        """
        with recorded_calls(self.layers()) as calls:
            losses = self.losses(batch)
        reached = nodes_behind(losses)
        uses = [_use(call, call.output) for call in calls if call.edge.node in reached]
        return {name: self._told(name, self._reason(of_one)) for name, _, of_one in self._by_parameter(uses)}

    def parts(self, use: LayerCall, rows: int) -> Iterator[LayerCall]:
        """Yield a call in parts of at most so many samples; layers with one position whole, as they need no more."""
        at_once = len(use.delta) if positions(use) == 1 else rows
        for start in range(0, len(use.delta), at_once):
            yield use.take(slice(start, start + at_once))

    def _by_parameter(self, uses: Iterable[LayerCall]) -> Iterator[tuple[str, nn.Parameter, list[LayerCall]]]:
        """Yield the parameters in use with their names and calls."""
        calls: dict[nn.Parameter, list[LayerCall]] = {}
        for use in uses:
            for p in trainable(use.layer):
                calls.setdefault(p, []).append(use.of_one(p))
        for name, p in self.parameters().items():
            if p in calls:
                yield name, p, calls[p]

    def _reason(self, uses: Sequence[LayerCall]) -> str:
        return "is used more than once." if len(uses) > 1 else self.reason_against_norms(uses[0])

    def _told(self, name: str, reason: str) -> str:
        return f"{self.by_gradients}: {name!r} {reason}" if reason else self.by_norms

    def gradients(self, use: LayerCall) -> Tensor:
        """Return g_i, `(b, *p.shape)`, of the one trainable parameter of a call."""
        return only(self.by_rule(self.rows, use))

    def own_squared_norms(self, name: str, uses: Sequence[LayerCall], rows: int) -> Tensor | None:
        """Return ‖g_i‖² by the package's own rule for norms, or None, and note in `norms_by` why."""
        use, found, reason = uses[0], None, self._reason(uses)
        if not reason:
            try:
                parts = self.parts(use, rows) if self.norms_form_gradients else [use]
                found = torch.cat([only(self.by_rule(self.squared_norms, part)) for part in parts])
            except UnsupportedModelError as refusal:
                reason = str(refusal)
        if found is not None and cancels(use, found):
            found, reason = None, "has gradients that are small beside the products which the rule adds up."
        self.norms_by[name] = self._told(name, reason)
        return found

    def layers(self) -> dict[str, nn.Module]:
        """Return, by path, the modules that own trainable parameters.

        Raises:
            UnsupportedModelError: the package has no right rule for one of them.
        """
        layers = {}
        for path, module in self.model.named_modules():
            if trainable(module):
                reason = self.reason_against(module)
                if reason:
                    raise UnsupportedModelError(f"{describe(path, module)} {reason} {FUSED_OR_VJP.capitalize()}.")
                layers[path] = module
        return layers

    def backward(
        self, batch: Batch, parameters: Iterable[nn.Parameter] = ()
    ) -> tuple[Tensor, list[Tensor | None], list[LayerCall]]:
        """Run forward and backward once.

        Returns:
            The detached losses, the gradients of their sum for `parameters` (None where it does not depend on one),
            and the uses of the layers.
        """
        refuse_lists(batch)
        parameters = list(parameters)
        with recorded_calls(self.layers()) as calls:
            losses = self.losses(batch)
        refuse_unseen_uses(losses, calls, self.parameters())
        for call in calls:
            require_batch_first(call, batch)
        # δ is taken where the output stands in the graph, before anything that was done to it in place.
        targets: list[Any] = [*parameters, *(call.edge for call in calls)]
        gradients = gradients_at(targets, losses, self.parameters())
        deltas = gradients[len(parameters) :]
        uses = [_use(call, delta) for call, delta in zip(calls, deltas, strict=True) if delta is not None]
        return losses.detach(), list(gradients[: len(parameters)]), uses

    def recorder(self, loss_reduction: LossReduction, wanted: Wanted) -> PeerRecorder:
        return PeerRecorder(self, loss_reduction, wanted)

    def square_sums(self, uses: Iterable[LayerCall]) -> dict[nn.Parameter, Tensor]:
        """Return Σ_i g_i² of the parameters in use."""
        return {p: g.square().sum(0) for p, g in self.summed_rows(uses).items()}

    def summed_rows(self, uses: Iterable[LayerCall]) -> dict[nn.Parameter, Tensor]:
        """Return the per-sample gradients, summed over all uses of each parameter."""
        total: dict[nn.Parameter, Tensor] = {}
        for use in uses:
            for p, g in self.by_rule(self.rows, use).items():
                total[p] = total[p] + g if p in total else g
        return total

    def by_rule(self, rule: Rule, use: LayerCall) -> dict[nn.Parameter, Tensor]:
        """Return what `rule` gives for the trainable parameters of one layer.

        Raises:
            UnsupportedModelError: the package raised.
        """
        try:
            with torch.no_grad(), without_autocast(use.delta.device):
                results = rule(use)
            results = {p: results[p] for p in trainable(use.layer)}
        except (UnsupportedModelError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            shapes = ", ".join(str(tuple(a.shape)) for a in use.inputs)
            raise UnsupportedModelError(
                f"{self.package} cannot handle {use.name} with an input of shape {shapes} ({type(error).__name__}: "
                f"{str(error).rstrip('.')}): {FUSED_OR_VJP}."
            ) from error
        # Some rules return δ itself, which layers side by side have in common.
        shared = use.delta.untyped_storage().data_ptr()
        return {p: g.clone() if g.untyped_storage().data_ptr() == shared else g for p, g in results.items()}


class PeerRecorder(CallRecorder):
    """Applies the package's rules once all gradients at the outputs of layers are known."""

    source: PeerRulesSource

    def __init__(self, source: PeerRulesSource, reduction: LossReduction, wanted: Wanted) -> None:
        super().__init__(source, source.layers(), reduction, wanted)
        self._uses: dict[ForwardPass, list[LayerCall]] = {}
        self._reading: Reading | None = None

    def begin(self, forward_pass: ForwardPass) -> None:
        super().begin(forward_pass)
        self._uses[forward_pass] = []
        self._reading = self.reading(forward_pass)

    def receive(self, forward_pass: ForwardPass, call: ModuleCall, delta: Tensor) -> None:
        self._uses[forward_pass].append(_use(call, delta))

    def sums(self, forward_pass: ForwardPass) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        uses = self._uses.pop(forward_pass)
        if self._reading is None:
            squares = self.source.square_sums(uses)
            return {}, {name: squares[p] for name, p in self.recorded.parameters.items() if p in squares}
        for block in self.source.blocks(uses, forward_pass.batch.size):
            self._reading.receive(block)
        return self._reading.total, self._reading.squares

    def quantities(self, forward_pass: ForwardPass) -> Sequence[Any]:
        return () if self._reading is None else self._reading.results()


def only(of_each: Mapping[nn.Parameter, Tensor]) -> Tensor:
    """Return the result for the one trainable parameter of a layer."""
    (result,) = of_each.values()
    return result


def alteration(layer: nn.Module) -> str | None:
    """Return how `layer`, of a class of `torch.nn`, differs from what its class says; None if it does not."""
    if name := own_callable(layer):
        return f"has its own {name}, set on the instance, which the rule for its class ignores."
    if reason := foreign_parameters(layer):
        return f"{reason}."
    return None


def own_callable(layer: nn.Module) -> str | None:
    """Return the name of a method that was set on the instance `layer` and hides that of its class, if any."""
    return next((name for name in vars(layer) if callable(getattr(type(layer), name, None))), None)


def _use(call: ModuleCall, delta: Tensor) -> LayerCall:
    refuse_changed_inputs(call)
    inputs = tuple(precise(a) for a in call.inputs)
    return LayerCall(call.name, call.module, inputs, precise(delta.reshape(call.output.shape)))
