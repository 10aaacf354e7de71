"""Recording by repeating the user's pass, for the backends that run the model themselves.

In the user's backward pass the gradient δ of the loss L arrives at the outputs z of the model. If L is a sum over the
samples, what sample i adds to the gradient of L is the gradient of

    ⟨δ_i, z_i⟩,    with δ_i held fixed,

so the backend takes the gradients of single samples of these products, as of any other loss, on the same batch, from
the random numbers and buffers with which the user's forward pass began. That it was the same pass again is proved each
time: the sum of the gradients must be the one that the user's backward pass gave.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from persample.dtypes import at_least_float32
from persample.errors import DisagreementError, UnsupportedModelError, UsageError
from persample.moments import Moments
from persample.quantities.block import Unknown
from persample.quantities.groups import Groups
from persample.sources.batch import Batch
from persample.sources.contract import Contract
from persample.sources.model.random_state import random_state, same_random_state
from persample.sources.model.refusals import refuse_hooked_parameters, refuse_impossible
from persample.sources.recording.forward_pass import ForwardPass, tensors_of
from persample.sources.recording.recorder import Recorder
from persample.sources.recording.reduction import refuse_uses_past_outputs
from persample.sources.recording.results import LossReduction, Sums, Wanted
from persample.sources.selfcheck.oracle import gradient, reentrant_refused
from persample.sources.selfcheck.returned import moments_of
from persample.sources.selfcheck.rounding import only_rounded
from persample.sources.selfcheck.rounds import QuantitiesOf
from persample.sources.selfcheck.tolerances import Allowance
from persample.sources.selfcheck.verify import repeating, require_close


class RepeatingRecorder(Recorder):
    """Lets a backend repeat the user's forward pass; the gradients at its outputs become the weights of a linear loss.

    Args:
        source: the backend.
        reduction: how the user reduces the losses.
        wanted: the quantities that are wanted, beside the moments.
    """

    def __init__(self, source: Contract, reduction: LossReduction, wanted: Wanted) -> None:
        super().__init__(source.model, source.parameters(), reduction, wanted)
        self.source = source
        self._deltas: dict[int, Tensor] = {}
        self._quantities: Sequence[Any] = ()

    def begin(self, forward_pass: ForwardPass) -> None:
        refuse_impossible(self.model)
        refuse_hooked_parameters(self.model, "use optimizer.observe(inputs, targets) with backend 'vjp' or 'loop'")
        self.source.refuse_unsupported()
        self._start = random_state(self.model)
        self._state = forward_pass.state = self.source.state()

    def end(self, forward_pass: ForwardPass, outputs: list[Tensor]) -> None:
        self._drew = not same_random_state(self._start, random_state(self.model))

    def before_backward(self, losses: Sequence[Tensor]) -> AbstractContextManager[Any]:
        if self.passes and not self.passes[-1].done:
            if any(loss.requires_grad for loss in losses):
                self._refuse_unrepeatable(self.passes[-1])
            self.refuse_unseparable(losses, self.source)
            edges = _outputs(self.passes[-1]).values()
            with torch._C.DisableTorchFunction():
                for loss in losses:
                    refuse_uses_past_outputs(loss, edges, self.recorded.parameters)
        return self.with_gradients()

    def run_backward(self, losses: Any, gradient: Any = None, *, retain_graph: bool | None = None) -> None:
        if self.passes and not self.passes[-1].done and self.passes[-1].outputs:
            with self.passes[-1].without_hooks():
                self._deltas = gradients_by_the_loss(losses, gradient, _outputs(self.passes[-1]))
        super().run_backward(losses, gradient, retain_graph=retain_graph)

    def after_backward(self, forward_pass: ForwardPass) -> Sums:
        size = forward_pass.batch.size
        if not all(bool(g.isfinite().all()) for g in (*self._deltas.values(), *self.gradients.values())):
            # A gradient scaler will skip the step: nothing can be told of single samples.
            nothing = {name: torch.full_like(p, torch.nan) for name, p in self.recorded.parameters.items()}
            self._quantities = self._of_unknown(forward_pass)
            return Sums(size, nothing, nothing)
        self.check(self.source, forward_pass)
        # In units of the largest δ, a power of two, so that neither overflow nor tolerances depend on its size.
        largest = max((delta.abs().max().item() for delta in self._deltas.values() if delta.numel()), default=0.0)
        unit = 2.0 ** math.floor(math.log2(largest)) if largest > 0 else 1.0
        deltas = [delta / unit for delta in self._deltas.values()]
        batch = forward_pass.batch.with_targets(deltas)
        with (
            self.aside(),
            forward_pass.under_autocast(),
            self.source.with_loss(_products(list(self._deltas)), self._start) as source,
        ):
            moments = self._repeated(source, batch, unit)
            if self.recorded.wanted.quantities:
                self._quantities = self._quantities_of(source, batch, forward_pass.groups, unit)
        squares = {name: at_least_float32(s) * (size * unit**2) for name, s in moments.second_moment.items()}
        return Sums(size, self.gradients, squares)

    def quantities(self, forward_pass: ForwardPass) -> Sequence[Any]:
        return self._quantities

    def left_out(self) -> Iterable[str]:
        return self.gradients

    def _quantities_of(self, source: Contract, batch: Batch, groups: Groups | None, unit: float) -> Sequence[Any]:
        """Return the quantities of the pass, repeated once more."""
        wanted = self.recorded.wanted
        factor = unit * wanted.factor(self.recorded.reduction, batch.size)
        compute = QuantitiesOf(wanted.quantities, groups, factor=factor)
        self._state.put_back()
        with repeating(source, self._start):
            return compute(source, batch).results

    def _of_unknown(self, forward_pass: ForwardPass) -> Sequence[Any]:
        """Return quantities of gradients that are not a number."""
        reading = self.reading(forward_pass, sums=False)
        if reading is None:
            return ()
        for name, p in self.recorded.parameters.items():
            reading.receive(Unknown(name, 0, forward_pass.batch.size, p.detach()))
        return reading.results()

    def _refuse_unrepeatable(self, forward_pass: ForwardPass) -> None:
        name = type(self.source).__name__
        if not forward_pass.outputs:
            raise UsageError(
                f"The model returned no tensor with the samples in dim 0, so {name} cannot split the loss by sample: "
                "return the outputs beside the loss, or use optimizer.observe(inputs, targets), or backend 'fused'."
            )
        if self._drew and not self.source.ordinary_random_stream:
            raise UnsupportedModelError(
                f"The model drew random numbers (dropout), and {name} draws different ones than an ordinary forward "
                "pass, so it cannot repeat yours: use optimizer.observe(inputs, targets), or backend 'fused' or "
                "'vjp'."
            )

    def _repeated(self, source: Contract, batch: Batch, unit: float) -> Moments:
        """Return the moments of the repeated pass, checked against the user's pass."""
        self._state.put_back()
        with repeating(source, self._start):
            losses = source.losses(batch)
            total = gradient(losses.sum(), source)
        allowance = Allowance.of(losses)
        ordinary = {name: at_least_float32(g) / unit for name, g in self.gradients.items()}
        repeated = {name: at_least_float32(total[name]) for name in ordinary}
        try:
            require_close(source, "gradient of the batch", repeated, ordinary, allowance, batch.size)
        except DisagreementError as disagreement:
            raise UnsupportedModelError(
                "The model's forward pass gave a different gradient when repeated: it draws random numbers from its "
                "own generator, keeps a state between calls, or changes its inputs in place; or inputs or model were "
                "changed before backward(). Use optimizer.observe(inputs, targets), or backend 'fused', which "
                f"repeats nothing. ({disagreement})"
            ) from disagreement
        moments = moments_of(source, batch)
        if source.check == "never":
            return moments
        try:
            mean = {name: g / batch.size for name, g in total.items()}
            require_close(source, "mean gradient", moments.mean, mean, allowance)
        except DisagreementError:
            self._state.put_back()
            if not only_rounded(source, batch, moments_of, moments, self._start):
                raise
        return moments


def gradients_by_the_loss(losses: Any, gradient: Any, outputs: Mapping[int, GradientEdge]) -> dict[int, Tensor]:
    """Return the gradient at each output, without what arrives through other outputs.

    If one output was computed from another, as a reconstruction from a code, the gradient that flows from the one to
    the other is left out: it belongs to the first already.

    Args:
        losses: the roots of the backward pass.
        gradient: the gradients at them, as for `torch.autograd.backward`.
        outputs: where the outputs stand in the graph.
    """
    found: dict[int, Tensor | None] = {}

    def stop_at(index: int, place: int) -> Callable[[tuple[Tensor | None, ...]], Any]:
        def hook(deltas: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
            found[index] = deltas[place]
            return tuple([None if i == place else delta for i, delta in enumerate(deltas)])

        return hook

    handles = [edge.node.register_prehook(stop_at(i, edge.output_nr)) for i, edge in outputs.items()]
    edges = list(outputs.values())
    try:
        with reentrant_refused():
            reached = torch.autograd.grad(losses, edges, gradient, retain_graph=True, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    # An output behind which there is no other is not run through, so no hook tells its gradient.
    deltas = {index: found.get(index, delta) for index, delta in zip(outputs, reached, strict=True)}
    return {index: delta.detach() for index, delta in deltas.items() if delta is not None}


def _outputs(forward_pass: ForwardPass) -> dict[int, GradientEdge]:
    """The nodes of the outputs with a row for each sample, each once."""
    places: dict[tuple[Node, int], int] = {}
    for index in forward_pass.outputs:
        edge = forward_pass.edges[index]
        places.setdefault((edge.node, edge.output_nr), index)
    return {index: forward_pass.edges[index] for index in places.values()}


def _products(indices: Sequence[int]) -> Callable[[Any, Any], Tensor]:
    """The loss ⟨δ_i, z_i⟩ of each sample, summed over the outputs z at `indices`, with δ as targets."""

    def loss_fn(outputs: Any, deltas: Sequence[Tensor]) -> Tensor:
        tensors = tensors_of(outputs)
        losses = deltas[0].new_zeros(len(deltas[0]), dtype=torch.promote_types(deltas[0].dtype, torch.float32))
        for index, delta in zip(indices, deltas, strict=True):
            output = tensors[index]
            if output.shape != delta.shape:
                raise UnsupportedModelError(
                    f"Repeated for some of the samples, the model's forward pass returned shape {tuple(output.shape)} "
                    f"instead of {tuple(delta.shape)}: dim 0 of that output is not the sample. Use "
                    "optimizer.observe(inputs, targets), or backend 'fused'."
                )
            known = torch.where(delta != 0, output, 0)  # attention masks may be infinite
            losses = losses + (at_least_float32(known) * delta).reshape(len(delta), -1).sum(1)
        return losses

    return loss_fn
