"""The gradients of the single samples by definition, without any code of the rest of the package that computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from persample.sources.model.recurrent_layers import repeatable
from persample.sources.splits.parts import Batched, Entries
from persample.sources.splits.tree import Split
from persample.testing.devices import set_seed

#: Where the random numbers of sample i come from: from one forward pass over the whole batch (`"batch"`), or from a
#: pass over this sample alone, which starts from the same seed for every sample (`"each"`).
Stream = Literal["batch", "each"]


@dataclass(frozen=True)
class Truth:
    """Losses, shape `(B,)`, and gradients, `{name: (B, *parameter.shape)}`, of the single samples."""

    losses: Tensor
    gradients: dict[str, Tensor]


def per_sample_truth(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    *,
    stream: Stream = "each",
    seed: int = 0,
) -> Truth:
    """Return what every backend must return, by one backward pass for each sample.

    Args:
        model: the network; a copy of it is used.
        loss_fn: `loss_fn(outputs, targets)` returns the loss of each sample, shape `(B,)`.
        inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments of the model; what
            `persample.shared` and the like say of them counts.
        targets: tensors whose dim 0 is the sample, or None.
        stream: `"each"` sends every sample alone through the model; `"batch"` sends the whole batch and propagates one
            entry of the losses, for models that draw random numbers for the batch at once.
        seed: of the random numbers, set before each pass.
    """
    size = next(size for leaf in pytree.tree_leaves(inputs) if (size := _size(leaf)) is not None)
    losses, rows = [], []
    for i in range(size):
        replica = copy.deepcopy(model)
        for parameter in replica.parameters():
            parameter.grad = None
        set_seed(seed)
        with torch.enable_grad():
            if stream == "batch":
                loss = loss_fn(call(replica, unwrapped(inputs)), targets)[i]
            else:
                loss = loss_fn(call(replica, unwrapped(row(inputs, i))), row(targets, i)).sum()
        if loss.requires_grad:
            with torch.autocast(loss.device.type, enabled=False):
                loss.backward()
        losses.append(loss.detach())
        rows.append({name: _gradient_of(p) for name, p in replica.named_parameters() if p.requires_grad})
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return Truth(torch.stack(losses), {name: torch.stack([r[name] for r in rows]) for name in names})


def call(model: nn.Module, inputs: Any) -> Any:
    """Return what `model` makes of `inputs`: a tensor, a tuple of arguments, or a dict of keyword arguments."""
    with repeatable(model):
        if isinstance(inputs, dict):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def unwrapped(tree: Any) -> Any:
    """Return `tree` as a model takes it, without what `persample.shared` and the like say of it."""
    return pytree.tree_map(lambda leaf: leaf.value if isinstance(leaf, Split) else leaf, tree)


def row(tree: Any, i: int) -> Any:
    """Return `tree` with every tensor replaced by its row `i`, of length one."""

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf[i : i + 1]
        if isinstance(leaf, Batched):
            return pytree.tree_map(lambda tensor: tensor.narrow(leaf.dim, i, 1).contiguous(), leaf.value)
        return leaf.value[i : i + 1] if isinstance(leaf, Entries) else leaf

    return pytree.tree_map(of_leaf, tree)


def _size(leaf: Any) -> int | None:
    """How many samples a leaf has; None if it does not tell."""
    if isinstance(leaf, Batched):
        return int(next(iter(pytree.tree_leaves(leaf.value))).shape[leaf.dim])
    held = leaf.value if isinstance(leaf, Entries) else leaf
    return len(held) if isinstance(held, Tensor | list) else None


def _gradient_of(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        return torch.zeros_like(parameter, requires_grad=False)
    return parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad.clone()
