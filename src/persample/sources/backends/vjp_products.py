"""Several vector-Jacobian products of one graph at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap


def batched_grad(
    outputs: Any, inputs: Any, grad_outputs: Tensor | Sequence[Tensor | None], **options: Any
) -> tuple[Tensor | None, ...]:
    """Return `torch.autograd.grad` for each entry of dim 0 of `grad_outputs`, with one pass through the graph.

    `is_grads_batched=True` of PyTorch does the same by an older kind of vmap, which has rules for fewer operations and
    cannot run inside of transforms of `torch.func`.

    Args:
        outputs: tensors with a graph.
        inputs: tensors and edges of it.
        grad_outputs: the vectors, with one more dimension in front.
        **options: further arguments of `torch.autograd.grad`.

    Returns:
        For each of `inputs` the products, with that dimension in front, or None if it is not reached.

    Raises:
        RuntimeError: the backward pass cannot be mapped by `torch.func`.
    """
    reached: list[bool] = []

    def product(*vectors: Tensor | None) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(outputs, inputs, vectors, **options)
        reached[:] = [g is not None for g in found]
        return tuple([g for g in found if g is not None])

    all_vectors = (grad_outputs,) if isinstance(grad_outputs, Tensor) else tuple(grad_outputs)
    in_dims = tuple([None if vectors is None else 0 for vectors in all_vectors])
    # A forward pass that activation checkpointing repeats draws the same random numbers for all products.
    products = iter(vmap(product, in_dims, randomness="same")(*all_vectors))
    return tuple([next(products) if known else None for known in reached])
