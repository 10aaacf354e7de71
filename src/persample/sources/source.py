"""`PerSampleGradSource`: the interface of every backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from persample.errors import OptionError, UnsupportedModelError
from persample.moments import Moments
from persample.quantities.computed import Quantities, refuse_quantities
from persample.quantities.gram import Gram
from persample.quantities.groups import as_groups
from persample.quantities.norms import Norms
from persample.quantities.projection import Projection
from persample.quantities.protocol import Quantity
from persample.quantities.weighted_sum import Weighted, WeightedSum, WeightedSumResult
from persample.sources.batch import Batch, as_batch
from persample.sources.contract import Contract, Receive, one_at_a_time
from persample.sources.model.autograd_graph import nodes_behind, variables_of
from persample.sources.model.eager import not_compiled, uncompiled
from persample.sources.model.isolation import parameters_counted, parameters_guarded, untouched
from persample.sources.model.random_state import random_state, random_state_restored, same_random_state
from persample.sources.model.refusals import refuse_impossible
from persample.sources.model.state import state_restored
from persample.sources.model.usage import Use
from persample.sources.recording.recorder import Recorder
from persample.sources.recording.repeating import RepeatingRecorder
from persample.sources.recording.results import LossReduction, Recorded, Wanted
from persample.sources.selfcheck.computed import Compute, computed
from persample.sources.selfcheck.oracle import losses_of_part, refuse_hidden_uses
from persample.sources.selfcheck.raw_errors import in_words
from persample.sources.selfcheck.returned import moments_of, per_sample_of, uses_of
from persample.sources.selfcheck.rounds import MAX_BYTES, QuantitiesOf, formed_blocks, samples_within
from persample.sources.selfcheck.verify import verify_unmixed


class PerSampleGradSource(Contract):
    """Per-sample gradients of a model's loss.

    A backend is a subclass that implements `compute_per_sample`, and `compute_moments` where it can do better than
    to average per-sample gradients. Everything else (the shape of a batch, what is refused, the self-check, leaving
    no trace) is done here, the same for all. During both methods gradients are enabled, every `p.grad` is None, and
    whatever they leave on the model is taken off again afterwards.

    Args:
        model: the network. Neither it nor its parameters are changed.
        loss_fn: `loss_fn(outputs, targets)` returns the loss of each sample, shape `(B,)`; a loss module of
            `torch.nn` is accepted too (see `persample.losses.as_per_sample`).
        check: when the self-check compares this backend with ordinary gradients and, for a few samples, with the
            loop over samples: on the `"first"` batch of its kind (default), `"always"`, or `"never"`.
    """

    # What users call.

    @not_compiled
    def moments(self, inputs: Any, targets: Any) -> Moments:
        """Return the mean gradient and the mean squared gradient of the single samples.

        Args:
            inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments of the model; dim 0 of
                every tensor is the sample, unless `persample.shared` or `persample.batched` say otherwise. A list of B
                entries, not all of them tensors of B entries, has one for each sample.
            targets: what `loss_fn` takes as second argument; the same holds of it.

        Returns:
            `Moments`, keyed by the names of the parameters that require a gradient, in the order of
            `model.named_parameters()`. A parameter that the batch does not reach has zeros.

        Raises:
            BatchError: inputs and targets are not a mini-batch.
            LossError: the loss is not a finite vector of length B.
            UnsupportedModelError: a part of the model has no per-sample gradient, or not with this backend.
            DisagreementError: the self-check found that the result is wrong, or the backend returned something else
                than its contract asks for.
        """
        moments: Moments = self._run(inputs, targets, moments_of)
        return moments

    @not_compiled
    def per_sample(self, inputs: Any, targets: Any) -> dict[str, Tensor]:
        """Return the gradient of the loss of each sample, `{name: (B, *parameter.shape)}`.

        Arguments, keys and errors are those of `moments`.
        """
        gradients: dict[str, Tensor]
        _, gradients = self._run(inputs, targets, per_sample_of)
        return gradients

    @not_compiled
    def compute(
        self,
        inputs: Any,
        targets: Any,
        *quantities: Quantity[Any],
        groups: Tensor | Sequence[int] | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> Quantities:
        """Return all `quantities` of the gradients of the single samples, from one forward and backward pass.

            norms, variance = Norms(), Variance()
            several = source.compute(inputs, targets, norms, variance)
            several[norms], several.variance, several.losses

        Args:
            inputs: a mini-batch, as for `moments`.
            targets: its targets.
            *quantities: what is wanted, such as `persample.quantities.Norms()`.
            groups: for each sample the number of its user, document or the like: the gradients of a group are added up
                first, and the quantities are those of the sums, in ascending order of the numbers.
            max_bytes: the most bytes of per-sample gradients to form at once. Backends that form them take some
                samples after the other, and repeat that where a quantity needs all of them again; `fused` and
                `hooks` need none.

        Raises:
            OptionError: something is no quantity, or an option of one has no meaning here.
            BatchError, LossError, UnsupportedModelError, DisagreementError: as `moments`.
        """
        refuse_quantities(quantities)
        batch = as_batch(inputs, targets, self.model)
        if type(max_bytes) is not int or max_bytes < 1:
            raise OptionError(f"max_bytes={max_bytes!r} must be a positive integer.")
        compute = QuantitiesOf(quantities, None if groups is None else as_groups(groups, batch.size), max_bytes)
        several: Quantities = self._run(inputs, targets, compute)
        return several

    def norms(self, inputs: Any, targets: Any) -> Tensor:
        """Return ‖g_i‖₂ of the gradient of each sample over all parameters, shape `(B,)`; see `compute`."""
        norms: Tensor = self.compute(inputs, targets, Norms()).norms
        return norms

    def weighted_sum(
        self, inputs: Any, targets: Any, weights: Tensor | Callable[[Tensor], Tensor]
    ) -> WeightedSumResult:
        """Return Σ_i w_i g_i with the norms, for weights `(B,)` or a function that makes them of the norms `(B,)`.

        Such a function clips, for example: `persample.quantities.clipping(1.0)`. It needs no second backward pass. See
        `compute` for groups and errors.
        """
        several = self.compute(inputs, targets, WeightedSum(weights))
        found: Weighted = several.weighted_sum
        return WeightedSumResult(found.gradient, found.weights, found.norms, several.losses)

    @not_compiled
    def gram(self, inputs: Any, targets: Any, *, other: tuple[Any, Any] | None = None) -> Tensor:
        """Return the products g_i·g_j of the gradients of all samples, shape `(B, B)`; see `compute`.

        Args:
            inputs: a mini-batch, as for `moments`.
            targets: its targets.
            other: inputs and targets of a second batch, whose gradients h_j take the place of g_j: `(B, n)`. At most
                256 MiB of these are formed at once, and the first batch is repeated for each such part.

        Raises:
            OptionError: `other` is no pair.
            UnsupportedModelError: as `compute`; or the model draws random numbers, and there are several such parts.
        """
        if other is None:
            products: Tensor = self.compute(inputs, targets, Gram()).gram
            return products
        if not isinstance(other, tuple) or len(other) != 2:
            raise OptionError("other must be a pair, the inputs and the targets of a second batch.")
        second = as_batch(*other, self.model)
        rows = samples_within(self, second, MAX_BYTES)
        start, columns = random_state(self.model), []
        for first in range(0, second.size, rows):
            args, kwargs, targets_of_part = second.take(slice(first, first + rows)).tree()
            gradients = self.per_sample(kwargs or args, targets_of_part)
            columns.append(self.compute(inputs, targets, Gram(other=gradients)).gram)
            if rows < second.size and not same_random_state(start, random_state(self.model)):
                raise UnsupportedModelError(
                    "The model draws random numbers (dropout), and the gradients of the second batch are computed in "
                    "parts, with other random numbers of the first batch for each: pass fewer samples as other=, or "
                    "call model.eval()."
                )
        return torch.cat(columns, 1)

    def project(self, inputs: Any, targets: Any, projection: Projection) -> Tensor:
        """Return `projection` of each gradient, shape `(B, projection.size)`; see `compute`."""
        sketch: Tensor = self.compute(inputs, targets, projection)[projection]
        return sketch

    @not_compiled
    def uses(self, inputs: Any = None, targets: Any = None) -> list[Use]:
        """Return what would serve each use of a parameter, without computing gradients.

        Args:
            inputs: a mini-batch, as for `moments`, on which the forward pass is run; nothing of that remains. None
                to go by what can be seen of the modules alone.
            targets: its targets.

        Returns:
            The uses in the order of the forward pass, or without a batch of the modules. That of the parameter None
            is a refusal of the whole model.

        Raises:
            BatchError: inputs and targets are not a mini-batch.
            LossError: the loss is not a finite vector of length B.
        """
        found: list[Use] = []
        try:
            self.refuse_hooks()
            if inputs is None:
                found += uses_of(self, None)
            else:
                batch = as_batch(inputs, targets, self.model)
                refuse_impossible(self.model)
                start = random_state(self.model)
                with (
                    batch.doubted(),
                    one_at_a_time.held(),
                    untouched(self.model) as state,
                    parameters_guarded(self.model),
                    state_restored(self.state()),
                    parameters_counted(self.model),
                    random_state_restored(self.model, start),
                    torch.enable_grad(),
                    uncompiled(),
                    in_words(self, batch, state),
                ):
                    found += uses_of(self, batch)
                    verify_unmixed(self, batch, start)
                    if self.parameters().keys() - {use.parameter for use in found}:
                        refuse_hidden_uses(self, batch.take(slice(0, 2)))
        except UnsupportedModelError as refusal:
            found.append(Use(None, "refused", "the model", "", str(refusal)))
        return found

    @contextmanager
    def recording(
        self,
        loss_reduction: LossReduction = "mean",
        *,
        quantities: Sequence[Quantity[Any]] = (),
        groups: Tensor | Sequence[int] | None = None,
        loss_scale: float | None = None,
    ) -> Iterator[Recorded]:
        """Record the moments of the user's own forward and backward passes, inside a `with` block.

            with source.recording() as recorded:
                loss = torch.nn.functional.cross_entropy(model(inputs), targets)
                loss.backward()
            moments = recorded.moments()

        Quantities of the gradients are told before, and found in `recorded.quantities`, for each backward pass:

            with source.recording(quantities=[Norms()]) as recorded:
                ...
            norms = recorded.quantities[0].norms

        The model is called as a whole, and `backward()` after each call of it. Dim 0 of its tensor arguments is the
        sample. `loss_fn` is not used. `p.grad` gets the gradient as usual.

        Args:
            loss_reduction: how the losses of the samples were reduced to a scalar, `"mean"` or `"sum"`. A mean is one
                over all samples that the model was called with.
            quantities: what is wanted beside the moments, such as `persample.quantities.Norms()`. `fused`, `hooks`
                and the rules of `backpack` and `opacus` take them from the pass itself, all others repeat it.
            groups: for each sample of a pass the number of its user, document or the like, as for `compute`; the same
                for each pass of the block.
            loss_scale: the number by which the losses are multiplied before the backward pass, as by a gradient scaler
                of mixed precision (`scaler.get_scale()`).

        Raises:
            BatchError: `groups` are not a whole number for each sample of a pass.
            UsageError: nothing was recorded, or backward passes cannot be told apart.
            UnsupportedModelError: a part of the model has no per-sample gradient, or not with this backend; or the
                forward pass cannot be repeated, by a backend that runs the model itself.
        """
        recorder = self.recorder(loss_reduction, Wanted(quantities, groups, loss_scale))
        with self.reading_blocks(), recorder:
            yield recorder.recorded

    # What a backend implements, where it can do better.

    def recorder(self, loss_reduction: LossReduction, wanted: Wanted) -> Recorder:
        """Return what records passes of the user's own; here it repeats each of them with `compute_moments`."""
        return RepeatingRecorder(self, loss_reduction, wanted)

    def compute_moments(self, batch: Batch) -> Moments:
        """Return the moments of `batch`; here as averages over `compute_per_sample`."""
        losses, gradients = per_sample_of(self, batch)
        return Moments(
            losses=losses,
            mean={name: g.mean(0) for name, g in gradients.items()},
            second_moment={name: g.square().mean(0) for name, g in gradients.items()},
        )

    def compute_blocks(self, batch: Batch, receive: Receive, max_bytes: int) -> Tensor:
        """Give `receive` the gradients of `batch` as blocks (see `persample.quantities.Block`).

        Each sample meets each parameter once; a parameter that the batch does not reach may be missing. Here they are
        formed by `compute_per_sample`, some samples after the other.

        Args:
            batch: the batch.
            receive: takes the blocks; all those of some samples before those of the next.
            max_bytes: as many bytes of per-sample gradients may be formed at once.

        Returns:
            The detached losses, shape `(B,)`.
        """
        return formed_blocks(self, batch, receive, max_bytes)

    def samples_at_once(self, batch: Batch, max_bytes: int) -> int:
        """Return how many samples a block of `compute_blocks` has; B if all parameters come as one block each."""
        return samples_within(self, batch, max_bytes)

    def find_uses(self, batch: Batch | None) -> Iterable[Use]:
        """Return what would serve each use of a parameter: see `uses`, which asks for it.

        Backends that go by layers or operations tell each of them. Here it is found out by trying two samples.

        Raises:
            UnsupportedModelError: the model is refused as a whole.
        """
        self.refuse_unsupported()
        names = list(self.parameters())
        if batch is not None:
            losses = self.losses(batch)
            reached = variables_of(nodes_behind(losses))
            names = [name for name, p in self.parameters().items() if p in reached]
            few = batch.take(slice(0, 2))
            losses_of_part(self, few)
            moments_of(self, few)
        return [Use(name, "rule", self.method, "") for name in names]

    def _run(self, inputs: Any, targets: Any, compute: Compute) -> Any:
        batch = as_batch(inputs, targets, self.model)
        refuse_impossible(self.model)
        self.refuse_hooks()
        self.refuse_unsupported()
        kind = self.kind_of(batch, compute.__name__) if self.check == "first" else ()
        checking = self.check == "always" or (self.check == "first" and kind not in self.checked)
        if checking:
            self.moving = None
        with (
            batch.doubted(),
            one_at_a_time.held(),
            untouched(self.model, self._frozen()) as state,
            torch.enable_grad(),
            uncompiled(),
            in_words(self, batch, state),
        ):
            self.ran, self.ran_because = None, ""
            if checking or not self.ordinary_state or self.moving is None:
                result = computed(self, batch, compute, state, checking)
            else:
                result = compute(self, batch)
            if batch.size > 1:  # a batch of one cannot show that samples are mixed
                self.checked.add(kind)
            return result
