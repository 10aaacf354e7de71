"""The gradients of the single samples by definition, written without any code of the package."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

#: Where the random numbers of sample i come from: it needs none; from one forward pass over the whole batch; or from
#: a pass over this sample alone, which starts from the same seed for every sample.
Stream = Literal["none", "batch", "each"]


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
    stream: Stream = "none",
    seed: int = 0,
) -> Truth:
    """Return what every backend must return; it works on a copy of `model`."""
    size = next(len(leaf) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
    losses, rows = [], []
    for i in range(size):
        replica = copy.deepcopy(model)
        for parameter in replica.parameters():
            parameter.grad = None
        torch.manual_seed(seed)
        with torch.enable_grad():
            if stream == "batch":
                loss = loss_fn(call(replica, inputs), targets)[i]
            else:
                loss = loss_fn(call(replica, row(inputs, i)), row(targets, i)).sum()
            if loss.requires_grad:
                loss.backward()
        losses.append(loss.detach())
        rows.append({name: gradient_of(p) for name, p in replica.named_parameters() if p.requires_grad})
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return Truth(torch.stack(losses), {name: torch.stack([r[name] for r in rows]) for name in names})


def call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def row(tree: Any, i: int) -> Any:
    return pytree.tree_map(lambda leaf: leaf[i : i + 1] if isinstance(leaf, Tensor) else leaf, tree)


def gradient_of(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        return torch.zeros_like(parameter, requires_grad=False)
    return parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad.clone()
