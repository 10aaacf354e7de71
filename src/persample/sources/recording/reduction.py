"""Checking that the user's scalar is the sum or the mean of one loss per sample."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from persample.errors import UnsupportedModelError, UsageError
from persample.sources.model.autograd_graph import nodes_from
from persample.sources.recording.results import LossReduction
from persample.sources.selfcheck.tolerances import largest_entry

# Products with zeros are zeros, so this is far above what rounding leaves of them.
_ROUNDING = 1e-6


def refuse_other_reduction(loss: Tensor, reduction: LossReduction, batch_size: int) -> None:
    """Raise if the last operation was a sum where a mean was announced, or the other way round.

    Raises:
        UsageError: it was.
    """
    found = _last_reduction(loss.grad_fn, batch_size)
    if loss.dim() == 0 and batch_size > 1 and found is not None and found != reduction:
        raise UsageError(
            f'The loss is a {found} over the samples, but loss_reduction="{reduction}": the gradients of single '
            f'samples would be wrong by the number of samples. Say loss_reduction="{found}".'
        )


def _last_reduction(node: Node | None, batch_size: int) -> LossReduction | None:
    kinds: dict[int, LossReduction] = {1: "mean", 2: "sum"}
    saved = getattr(node, "_saved_reduction", None)
    if saved is not None:
        return kinds.get(saved)
    sizes = getattr(node, "_saved_self_sym_sizes", None)
    if node is None or not sizes or sizes[0] % batch_size != 0:  # for example a sum over several losses
        return None
    kind = node.name().rstrip("0123456789")
    return "mean" if kind == "MeanBackward" else "sum" if kind == "SumBackward" else None


def refuse_weighted_mean(loss: Tensor, outputs: Iterable[GradientEdge], batch_size: int) -> None:
    """Raise if a mean between the outputs and `loss` divides by the targets' weights, not by their number.

    Targets may be ignored if all samples have as many of them, as the last ones of sequences: then the divisor is one
    number for all.

    Raises:
        UsageError: it does.
    """
    for node in nodes_from([loss.grad_fn], stop={edge.node for edge in outputs}):
        if "NllLoss" not in node.name() or getattr(node, "_saved_reduction", None) != 1:
            continue
        saved: Any = node
        weights, count = float(saved._saved_total_weight), saved._saved_target.numel()
        if weights != count and not _ignored_alike(node, batch_size):
            by = (
                f"some are ignored, in some samples more than in others: PyTorch divides by the other {weights:g}"
                if saved._saved_weight is None
                else f"some are weighted: PyTorch divides by the sum of the weights ({weights:g})"
            )
            raise UsageError(
                f"The loss is a mean over {count} targets of which {by}, which depends on all samples, so the loss of "
                'a single sample cannot be told. Use reduction="sum" and say loss_reduction="sum", or use '
                "optimizer.observe(inputs, targets)."
            )


def _ignored_alike(node: Node, batch_size: int) -> bool:
    """Whether the mean has no weights, and every sample has as many targets that are not ignored."""
    saved: Any = node
    target, index = saved._saved_target, saved._saved_ignore_index
    if saved._saved_weight is not None or target.numel() % batch_size != 0:
        return False
    if index >= 2**63:  # a negative number, saved as an unsigned one
        index -= 2**64
    counts = (target != index).reshape(batch_size, -1).sum(1)
    return bool((counts == counts[0]).all())


def refuse_joint_loss(loss: Tensor, outputs: Sequence[GradientEdge], batch_size: int) -> None:
    """Raise if `loss` is not a sum of terms that each depend on the outputs for one sample.

    For L = Σ_i ℓ_i(z_i) the second derivatives ∂²L / ∂z_i ∂z_j vanish for i ≠ j. Here one product of them with random
    numbers is taken, from one half of the samples to the other. A loss that PyTorch cannot differentiate twice is not
    looked at.

    Args:
        loss: L.
        outputs: where the outputs z of the model, whose dim 0 is the sample, stand in its graph.
        batch_size: B.

    Raises:
        UnsupportedModelError: it is not.
    """
    edges = _last_before(loss, outputs)
    if batch_size == 1 or not edges:
        return
    generator = torch.Generator().manual_seed(batch_size)
    order = torch.randperm(batch_size, device="cpu", generator=generator)
    half, others = order[: batch_size // 2], order[batch_size // 2 :]
    try:
        deltas = torch.autograd.grad(loss.sum(), edges, create_graph=True, allow_unused=True)
        product = torch.zeros((), device=loss.device)
        for delta in deltas:
            if delta is not None:
                rows = delta[half]
                product = product + (rows * torch.randn(rows.shape, device="cpu", generator=generator).to(rows)).sum()
        if not product.requires_grad:
            return  # L is linear in the outputs
        second = torch.autograd.grad(product, edges, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if any(
            reason in str(error) for reason in ("is not implemented", "once_differentiable", "trying to differentiate")
        ):
            return
        raise
    largest = max((largest_entry(h) for h in second if h is not None), default=0.0)
    across = max((largest_entry(h[others]) for h in second if h is not None), default=0.0)
    if across > _ROUNDING * largest:
        raise UnsupportedModelError(
            "The loss is not a sum over the samples: the term of one sample depends on others (a contrastive loss, a "
            "root or a logarithm of a mean, a division by a sum over the batch), so the gradient of a single sample "
            "does not exist. Make every sample's loss depend on that sample alone, and take their mean or sum last."
        )


def refuse_uses_past_outputs(
    loss: Tensor, outputs: Iterable[GradientEdge], parameters: Mapping[str, nn.Parameter]
) -> None:
    """Raise if `loss` depends on a parameter other than through the outputs of the model.

    Raises:
        UnsupportedModelError: it names the parameter.
    """
    names: dict[Tensor, str] = {p: name for name, p in parameters.items()}
    for node in nodes_from([loss.grad_fn], stop={edge.node for edge in outputs}):
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and variable in names:
            raise UnsupportedModelError(used_outside(names[variable]))


def used_outside(name: str) -> str:
    """Return the refusal of a parameter that is used outside the model's forward pass."""
    return (
        f"Parameter {name!r} is used outside the call of the model. If that is a penalty on the weights: it is no sum "
        "over the samples, so no backend has gradients of single samples for it. The prior is such a penalty: "
        "w * Σ θ² beside a mean loss is prior_precision = 2 * w * data_size, and prior_mean and prior_precision take "
        "tensors for each parameter, as for EWC. Any other one is added by penalty.backward() after the block, before "
        "step(). If the loss needs something inside of the model (a part called by itself, an activation that a hook "
        "kept), let the model's forward() return it."
    )


def divisor_of(loss: Tensor) -> float:
    """Return the number that the loss was divided by last; 1 if it was not."""
    node = loss.grad_fn
    kind = "" if node is None else node.name()
    other = getattr(node, "_saved_other", None)
    if kind not in ("DivBackward0", "MulBackward0") or not isinstance(other, Tensor) or other.numel() != 1:
        return 1.0
    factor = float(other.detach())
    return factor if kind == "DivBackward0" else 1 / (factor or 1.0)


def _last_before(loss: Tensor, outputs: Iterable[GradientEdge]) -> list[GradientEdge]:
    """Those of `outputs` that the loss was computed from, without those that feed others of them."""
    by_node = {edge.node: edge for edge in outputs}
    met = [node for node in nodes_from([loss.grad_fn], stop=by_node) if node in by_node]
    behind = {node: nodes_from([n for n, _ in node.next_functions]) for node in met} if len(met) > 1 else {}
    return [by_node[node] for node in met if not any(node in found for found in behind.values())]
