"""Per-sample losses: negative log-likelihoods of shape (B,), and conversion of the losses of `torch.nn`.

`loss_fn(outputs, targets)` must return one loss per sample. A scalar does not say what it was divided by
(`nn.MSELoss` divides by B·C, `nn.CrossEntropyLoss` with weights by their sum), so a scalar is refused.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persample.errors import LossError, NonFiniteLossError

PerSampleLoss = Callable[[Any, Any], Tensor]

# Losses that compare outputs and targets element by element. PyTorch broadcasts them against each other, so that
# outputs (B, 1) and targets (B,) silently become a (B, B) table in which every sample meets every target.
_ELEMENTWISE = (
    nn.L1Loss,
    nn.MSELoss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.PoissonNLLLoss,
    nn.KLDivLoss,
    nn.SoftMarginLoss,
    nn.HingeEmbeddingLoss,
)

# Losses of torch.nn that compare more than two things.
_OTHER_ARGUMENTS = (
    nn.CosineEmbeddingLoss,
    nn.CTCLoss,
    nn.GaussianNLLLoss,
    nn.MarginRankingLoss,
    nn.TripletMarginLoss,
    nn.TripletMarginWithDistanceLoss,
)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of a categorical distribution, in nats.

    Args:
        outputs: logits, shape `(B, C)`, or `(B, C, d1, …)` with one label for each position.
        targets: class indices of shape `(B, d1, …)`, or class probabilities of the shape of `outputs`.

    Returns:
        −log p(target | output) of each sample, summed over its positions, shape `(B,)`.
    """
    return sum_per_sample(F.cross_entropy(outputs, targets, reduction="none"))


def gaussian(outputs: Tensor, targets: Tensor, *, noise_precision: float = 1.0) -> Tensor:
    """Negative log-likelihood of a Gaussian with mean `outputs` and a fixed precision (1 / variance), in nats.

    Args:
        outputs: predicted means, shape `(B, …)`.
        targets: observed values, of exactly the same shape.
        noise_precision: β = 1/σ² of the observation noise.

    Returns:
        Σ ½ β (y − f)² + ½ log(2π/β) over the entries of each sample, shape `(B,)`.

    Raises:
        LossError: the shapes differ.
    """
    _refuse_broadcast("losses.gaussian", outputs, targets)
    squared = (outputs - targets).square()
    constant = 0.5 * math.log(2 * math.pi / noise_precision)
    return sum_per_sample(0.5 * noise_precision * squared + constant)


def bernoulli(outputs: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of independent Bernoulli variables, in nats.

    Args:
        outputs: logits, shape `(B, …)`.
        targets: zeros and ones (or probabilities), of exactly the same shape.

    Returns:
        −log p(target | output) summed over the entries of each sample, shape `(B,)`.

    Raises:
        LossError: the shapes differ.
    """
    _refuse_broadcast("losses.bernoulli", outputs, targets)
    entries = F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="none")
    return sum_per_sample(entries)


def as_per_sample(loss_fn: Callable[[Any, Any], Any]) -> PerSampleLoss:
    """Return `loss_fn` as a function of `(outputs, targets)` that gives one loss per sample.

    A loss module of `torch.nn` (`nn.CrossEntropyLoss()`, `nn.MSELoss()`, …) is accepted as a convenience: a copy of
    it with `reduction="none"` is used, and what remains beside the sample is summed, so the loss of a sample is the
    sum over its entries, whatever `reduction` said. Weighted or ignored targets count with their weight or zero and
    divide nothing. Every other callable is used as it is.

    Raises:
        LossError: `loss_fn` is not callable.
    """
    if isinstance(loss_fn, type):
        raise LossError(
            f"loss_fn is the class {loss_fn.__name__} itself: pass one of its instances, {loss_fn.__name__}(), or a "
            "function of (outputs, targets)."
        )
    if getattr(loss_fn, "__name__", "") == "training_step":
        raise LossError(
            "loss_fn is training_step, which takes a batch and returns one mean: pass a function of (outputs, targets) "
            "that returns one loss per sample, for example persample.losses.cross_entropy; or run training_step "
            "inside `with optimizer.sampled_params(train=True):`, for which an optimizer needs no loss_fn."
        )
    if not callable(loss_fn):
        raise LossError(
            f"loss_fn is {loss_fn!r}, which cannot be called: pass a function of (outputs, targets) that returns "
            "one loss per sample, for example persample.losses.cross_entropy."
        )
    if isinstance(loss_fn, _OTHER_ARGUMENTS):
        raise LossError(
            f"{type(loss_fn).__name__} does not take the arguments (outputs, targets): pass a function of these two "
            "that calls it with reduction='none' and returns one loss per sample."
        )
    if type(loss_fn).__module__ == nn.CrossEntropyLoss.__module__ and hasattr(loss_fn, "reduction"):
        return _unreduced(loss_fn)
    return loss_fn


def _unreduced(loss_module: Any) -> PerSampleLoss:
    name = type(loss_module).__name__

    def per_sample_loss(outputs: Any, targets: Any) -> Tensor:
        if isinstance(loss_module, _ELEMENTWISE):
            _refuse_broadcast(name, outputs, targets)
        if torch.compiler.is_dynamo_compiling() and not (loss_module._forward_hooks or loss_module._forward_pre_hooks):
            return sum_per_sample(type(loss_module).forward(_Entrywise(loss_module), outputs, targets))
        entrywise = copy.copy(loss_module)  # with the settings that it has by now
        entrywise.reduction = "none"
        return sum_per_sample(entrywise(outputs, targets))

    return per_sample_loss


class _Entrywise:
    """A loss module as its own method `forward` sees it, but for `reduction`: for Dynamo, which follows no copying."""

    reduction = "none"

    def __init__(self, loss_module: nn.Module) -> None:
        self._loss_module = loss_module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loss_module, name)


def _refuse_broadcast(name: str, outputs: Any, targets: Any) -> None:
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        raise LossError(
            f"{name} compares two tensors, but got outputs of type {type(outputs).__name__} and targets of type "
            f"{type(targets).__name__}. {advice_to_take_out(outputs)}"
        )
    if outputs.shape != targets.shape:
        raise LossError(
            f"{name} got outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(targets.shape)}: "
            "broadcasting them would pair the wrong entries. Give both the same shape, for example with "
            "targets.unsqueeze(1) or outputs.squeeze(1)."
        )


def advice_to_take_out(outputs: Any) -> str:
    """Return advice on how a loss takes the tensor out of a model's output."""
    names = tensors_by_name(outputs)
    if isinstance(outputs, tuple | list):
        tensor = "outputs[0]"
    elif isinstance(outputs, Mapping) and names:
        tensor = f"outputs[{next(iter(names))!r}]"
    else:
        tensor = f"outputs.{next(iter(names), 'logits')}"
    having = f"It holds the tensors {', '.join(names)}. " if names else ""
    return f"{having}Take the tensor out: lambda outputs, targets: loss({tensor}, targets)."


def tensors_by_name(outputs: Any) -> dict[str, Tensor]:
    """Return the tensors that a mapping or an object holds by name."""
    entries = outputs if isinstance(outputs, Mapping) else getattr(outputs, "__dict__", {})
    return {str(name): value for name, value in entries.items() if isinstance(value, Tensor)}


def sum_per_sample(entries: Tensor) -> Tensor:
    """Return the sum over the entries of each sample, shape `(B,)`, of entries `(B, …)`."""
    return entries.flatten(1).sum(1) if entries.dim() > 1 else entries


def _divisor(scalar: Tensor) -> str:
    """Describe what a scalar loss was divided by, as far as its graph shows."""
    node = scalar.grad_fn
    for _ in range(_MOST_STEPS):
        if node is None or "NllLoss" in node.name():
            break
        node = node.next_functions[0][0] if node.next_functions else None
    saved: Any = node
    with torch._C.DisableTorchFunction():
        if getattr(saved, "_saved_reduction", None) == 1:
            if saved._saved_weight is not None:
                return "a mean that divides by the class weights of all targets in the batch"
            if float(saved._saved_total_weight) != saved._saved_target.numel():
                return "a mean that divides by how many targets in the whole batch are not ignored (ignore_index)"
    return "which does not say what it was divided by"


_MOST_STEPS = 5  # from the scalar to the loss of PyTorch's, past views and products with numbers


def require_losses(found: Any, batch_size: int) -> Tensor:
    """Return `found` if it is a finite floating-point vector of length `batch_size`.

    Raises:
        LossError: it is something else, in particular a scalar.
        NonFiniteLossError: an entry is infinite or not a number (not looked at while a CUDA graph is captured).
    """
    losses = _require_vector(found, batch_size)
    if losses.is_cuda and torch.cuda.is_current_stream_capturing():
        return losses  # while a CUDA graph is captured there are no values yet
    with torch._C.DisableTorchFunction():  # a look at the values only: whoever follows the operations need not
        values = losses.detach()
        if math.isfinite(values.sum().item()):  # the usual case, at the cost of one sum
            return losses
        samples = torch.nonzero(~torch.isfinite(values)).flatten().tolist()
    if samples:
        raise NonFiniteLossError(
            f"The loss of sample {samples[0]} is {losses[samples[0]].item()} ({len(samples)} of {batch_size} losses "
            "are not finite): check the inputs, the targets and the learning rate."
        )
    return losses


def _require_vector(losses: Any, batch_size: int) -> Tensor:
    if not isinstance(losses, Tensor):
        raise LossError(f"loss_fn returned {type(losses).__name__}: return a tensor of shape ({batch_size},).")
    if losses.dim() == 0:
        raise LossError(
            f"loss_fn returned a scalar, {_divisor(losses)}: return the loss of each "
            f"sample, shape ({batch_size},). In PyTorch that is reduction='none', for example "
            "lambda outputs, targets: F.cross_entropy(outputs, targets, reduction='none'), or a function of "
            "persample.losses."
        )
    if losses.shape == (batch_size, 1):
        raise LossError(
            f"loss_fn returned a column, shape ({batch_size}, 1): return one loss per sample, shape ({batch_size},), "
            "by losses.squeeze(1)."
        )
    if losses.shape == (batch_size, batch_size):
        raise LossError(
            f"loss_fn returned shape ({batch_size}, {batch_size}): perhaps it compared each output with each target, "
            "as PyTorch does with outputs (B, 1) and targets (B,). Give both the same shape, and return one loss per "
            f"sample, shape ({batch_size},)."
        )
    if losses.shape != (batch_size,):
        raise LossError(
            f"loss_fn returned shape {tuple(losses.shape)}, but the batch has {batch_size} samples: return one loss "
            f"per sample, shape ({batch_size},), for example by losses.flatten(1).sum(1)."
        )
    if not losses.is_floating_point():
        raise LossError(f"loss_fn returned {losses.dtype}: a loss must be a real floating-point number.")
    return losses
