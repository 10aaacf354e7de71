"""The autograd graph of the losses: walking it, and telling which backward pass runs through it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import Node


def nodes_behind(losses: Tensor) -> set[Node]:
    """Return all nodes of the autograd graph of `losses`."""
    return nodes_from([losses.grad_fn])


def nodes_from(start: Iterable[Node | None], stop: Collection[Node] = ()) -> set[Node]:
    """Return all nodes of the autograd graph reachable from `start` without passing `stop`."""
    found: set[Node] = set()
    pending = [node for node in start if node is not None]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            if node not in stop:
                pending += [following for following, _ in node.next_functions if following is not None]
    return found


def variables_of(nodes: Iterable[Node]) -> set[Tensor]:
    """Return the leaves, such as parameters, whose gradients these nodes accumulate."""
    variables = (getattr(node, "variable", None) for node in nodes)
    return {variable for variable in variables if isinstance(variable, Tensor)}


@contextmanager
def outer_backward(roots: Iterable[Tensor]) -> Iterator[Callable[[], bool]]:
    """Yield a function that tells, in the backward pass from `roots`, whether it is this one that is running.

    Otherwise it is one inside of it: deep equilibrium models solve for their gradient in a hook, by
    `torch.autograd.grad` through the same layers. Outside of any backward pass the answer is yes.
    """
    tasks = {_OUTSIDE}

    def begin(_: Tensor) -> None:
        tasks.add(torch._C._current_graph_task_id())

    handles = [root.register_hook(begin) for root in roots if root.requires_grad]
    try:
        yield lambda: torch._C._current_graph_task_id() in tasks
    finally:
        for handle in handles:
            handle.remove()


_OUTSIDE = -1  # what PyTorch calls the task where no backward pass is running
