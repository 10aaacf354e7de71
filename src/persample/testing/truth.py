"""The gradients of the single samples by definition, written without any code of the rest of the package."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

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
        inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments of the model.
        targets: tensors whose dim 0 is the sample, or None.
        stream: `"each"` sends every sample alone through the model; `"batch"` sends the whole batch and propagates one
            entry of the losses, for models that draw random numbers for the batch at once.
        seed: of the random numbers, set before each pass.
    """
    size = next(len(leaf) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
    losses, rows = [], []
    for i in range(size):
        replica = copy.deepcopy(model)
        for parameter in replica.parameters():
            parameter.grad = None
        set_seed(seed)
        with torch.enable_grad():
            if stream == "batch":
                loss = loss_fn(call(replica, inputs), targets)[i]
            else:
                loss = loss_fn(call(replica, row(inputs, i)), row(targets, i)).sum()
        if loss.requires_grad:
            with torch.autocast(loss.device.type, enabled=False):
                loss.backward()
        losses.append(loss.detach())
        rows.append({name: _gradient_of(p) for name, p in replica.named_parameters() if p.requires_grad})
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return Truth(torch.stack(losses), {name: torch.stack([r[name] for r in rows]) for name in names})


def set_seed(seed: int) -> None:
    """Set the random numbers of the CPU, a hundred times as fast as `torch.manual_seed`, which looks for devices."""
    torch.default_generator.manual_seed(seed)


def call(model: nn.Module, inputs: Any) -> Any:
    """Return what `model` makes of `inputs`: a tensor, a tuple of arguments, or a dict of keyword arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def row(tree: Any, i: int) -> Any:
    """Return `tree` with every tensor replaced by its row `i`, of length one."""
    return pytree.tree_map(lambda leaf: leaf[i : i + 1] if isinstance(leaf, Tensor) else leaf, tree)


def _gradient_of(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        return torch.zeros_like(parameter, requires_grad=False)
    return parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad.clone()
