"""One call of the model by the user, remembered until its backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils import _pytree as pytree

from persample.quantities.groups import Groups
from persample.sources.batch import Batch
from persample.sources.model.state import State
from persample.sources.splits.objects import tensors_held


@dataclass(eq=False)
class ForwardPass:
    """One call of the model by the user.

    Attributes:
        batch: what it was called with; the targets are the numbers of the samples.
        groups: those of its samples, where quantities are taken of sums over groups.
        autocast: the dtypes of `torch.autocast` then, by kinds of device.
        state: that of the model when it began, where the self-check needs it.
        edges: where the tensors that it returned stand in the graph, those of them that do.
        hooks: those that the model put on these tensors (`Tensor.register_hook`), as the tensors hold them.
        outputs: which of the tensors that it returned have a number, or more, for each sample.
        reached: which of the tensors that it returned a backward pass has given a gradient.
        done: whether a backward pass has gone through it.
        divisor: by what number the loss was divided last.
        added: whether its gradients were added to others in `p.grad`.
        covered: for each sample whether the loss depends on its outputs; None if unknown.
    """

    batch: Batch
    groups: Groups | None = None
    autocast: Mapping[str, torch.dtype] = field(default_factory=dict)
    state: State | None = None
    edges: dict[int, GradientEdge] = field(default_factory=dict)
    hooks: list[dict[int, Any]] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    reached: set[int] = field(default_factory=set)
    done: bool = False
    divisor: float = 1.0
    added: bool = False
    covered: Tensor | None = None

    def receive(self, index: int, delta: Tensor) -> None:
        """Note the gradient of the loss at one of the tensors that the model returned."""
        self.reached.add(index)
        if delta.dim() > 0 and len(delta) == self.batch.size:
            nonzero = delta.detach() != 0
            covered = nonzero.flatten(1).any(1) if delta.dim() > 1 else nonzero
            self.covered = covered if self.covered is None else self.covered | covered
        else:  # a loss that the model computed itself, or another layout
            self.covered = None

    @contextmanager
    def without_hooks(self) -> Iterator[None]:
        """Deliver the loss's gradients at the outputs before the model's own hooks change them.

        Such a hook belongs to the gradient of the model, and may act only once, as in deep equilibrium models.
        """
        held = [dict(hooks) for hooks in self.hooks]
        for hooks in self.hooks:
            hooks.clear()
        try:
            yield
        finally:
            for hooks, before in zip(self.hooks, held, strict=True):
                hooks.update(before)

    @contextmanager
    def under_autocast(self) -> Iterator[None]:
        """Restore the `torch.autocast` state of that time."""
        with ExitStack() as stack:
            for kind, dtype in self.autocast.items():
                stack.enter_context(torch.autocast(kind, dtype))
            yield


def tensors_of(outputs: Any) -> list[Tensor]:
    """Return the tensors in a model's output, in order, including those in objects such as distributions."""
    tensors = [tensor for leaf in pytree.tree_leaves(outputs) for tensor in tensors_held(leaf)]
    return [tensor for tensor in tensors if not isinstance(tensor, nn.Parameter)]
