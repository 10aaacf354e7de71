"""The diagonal of the Fisher information of a network, over a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from persample import losses
from persample.curvature.information import Fisher, Kind, require_kind
from persample.curvature.of_outputs import distribution_of, logits_of
from persample.errors import UsageError
from persample.likelihoods import TargetDistribution
from persample.loaders import batches_of, put_together
from persample.sources import PerSampleGradSource, make_source
from persample.sources.batch import as_batch
from persample.sources.model.calling import called
from persample.sources.model.isolation import untouched
from persample.vogn.settings import require_count, require_generator


def fisher(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    loss_fn: Callable[[Any, Any], Any],
    kind: Kind = "empirical",
    draws: int = 1,
    generator: torch.Generator | None = None,
    backend: str = "fused",
    backend_options: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Fisher:
    """Return the diagonal of the Fisher information, averaged over the samples of a loader.

    With g_i(y) = ∇_w −log p(y | x_i, w) the gradient of sample i's loss for the target y:

        empirical:  Σ_i g_i(y_i)² / N                        with the targets of the data
        mc:         Σ_i Σ_k g_i(y_ik)² / (N K)               with K targets drawn from the model, y_ik ~ p(y | x_i, w)
        exact:      Σ_i E_{y ~ p(y | x_i, w)}[g_i(y)²] / N   by one backward pass for each output

    The loss of a sample is the sum over its positions, if it has several: targets of "mc" are drawn for each of them,
    and "exact" takes a backward pass for each output at each. Positions whose target is `ignore_index` carry no
    information.

    Sources: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017; Martens, "New
    Insights and Perspectives on the Natural Gradient Method", JMLR 2020; Kunstner et al., "Limitations of the empirical
    Fisher approximation for natural gradient descent", NeurIPS 2019.

    Small batches after the first are put together, to at most 512 samples and 8 MiB, which gives the same and takes
    less time. The first is as the loader gives it, because the source checks itself on it.

    The model stays in the mode it is in: call `model.eval()` before, to leave dropout out. It is called once more for
    each batch where targets are drawn or expectations are taken. A data set may be done in parts, see `Fisher.merge`.

    Args:
        model: the network. Neither it nor its parameters are changed.
        loader: a DataLoader or any iterable of batches: pairs (inputs, targets), or dicts whose entry "labels" (or
            "targets") holds the targets.
        loss_fn: the loss of each sample, as for `persample.make_source`. For "mc" and "exact" it is one of
            `persample.likelihoods`, `persample.losses.cross_entropy`, `bernoulli` or `gaussian` (by `functools.partial`
            with its noise), or PyTorch's cross entropy; the model's outputs may be an object with `.logits`, of which
            the loss is taken.
        kind: see above.
        draws: K, for "mc".
        generator: source of the drawn targets, on the device of the outputs; None is PyTorch's global generator.
        backend: name of the source of per-sample gradients (`persample.backends()` lists them).
        backend_options: options of that source.
        progress: whether to show a bar, by tqdm.

    Raises:
        OptionError: an argument is out of its range.
        UsageError: the loader is empty, `loss_fn` is no distribution that `kind` knows, or nothing requires a gradient.
        PersampleError: whatever the source refuses.
    """
    require_kind(kind)
    require_count("draws", draws)
    require_generator("generator", generator)
    if not any(p.requires_grad for p in model.parameters()):
        raise UsageError(
            "There is no Fisher information: the model has no parameter that requires a gradient; call "
            "requires_grad_(True) on those that are wanted."
        )
    losses.as_per_sample(loss_fn)
    targets_of = None if kind == "empirical" else distribution_of(loss_fn)
    of_source = loss_fn if targets_of is None else _product if kind == "exact" else _of_logits(loss_fn)
    source = make_source(backend, model, of_source, **dict(backend_options or {}))
    sums: dict[str, Tensor] = {}
    size = 0
    batches = batches_of(loader, progress=progress)
    first = islice(batches, 1)
    for inputs, targets in batches if kind == "mc" else chain(first, put_together(batches)):
        number = 0
        weight = 1.0 / draws if kind == "mc" else 1.0
        for of_pass in _targets(model, inputs, targets, kind, targets_of, draws, generator):
            number = _add(sums, source, inputs, of_pass, weight)
        size += number
    if not size:
        raise UsageError("The loader has no batches, so there is no Fisher information: pass one with data.")
    return Fisher({name: total / size for name, total in sums.items()}, size, kind)


def _targets(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    kind: Kind,
    targets_of: TargetDistribution | None,
    draws: int,
    generator: torch.Generator | None,
) -> Iterator[Any]:
    """The targets of each pass over a batch."""
    if targets_of is None:
        yield targets
        return
    with untouched(model), torch.no_grad():
        args, kwargs, _ = as_batch(inputs, None, model).for_a_call()
        outputs = logits_of(called(model, args, kwargs)).detach()
    if kind == "exact":
        yield from targets_of.roots_for(outputs, targets)
        return
    for _ in range(draws):
        yield targets_of.draw_for(outputs, targets, generator)


def _add(sums: dict[str, Tensor], source: PerSampleGradSource, inputs: Any, targets: Any, weight: float) -> int:
    """Add Σ g_i² of one pass; return the number of its samples."""
    moments = source.moments(inputs, targets)
    for name, square in moments.second_moment.items():
        value = square.to(torch.promote_types(square.dtype, torch.float32))
        sums.setdefault(name, torch.zeros_like(value)).add_(value, alpha=weight * moments.batch_size)
    return moments.batch_size


def _product(outputs: Any, vectors: Tensor) -> Tensor:
    """⟨f_i, v_i⟩ of each sample, whose gradient is Jᵀ v."""
    return losses.sum_per_sample(logits_of(outputs) * vectors)


def _of_logits(loss_fn: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The loss of the tensor in the outputs."""
    per_sample = losses.as_per_sample(loss_fn)
    return lambda outputs, targets: per_sample(logits_of(outputs), targets)
