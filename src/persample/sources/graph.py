"""Walking the autograd graph of the losses."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import Tensor
from torch.autograd.graph import Node


def nodes_behind(losses: Tensor) -> set[Node]:
    """Return all nodes of the autograd graph of `losses`."""
    return nodes_from([losses.grad_fn])


def nodes_from(start: Iterable[Node | None], stop: Collection[Node] = ()) -> set[Node]:
    """Return all nodes of the autograd graph that can be reached from `start`, but nothing behind those of `stop`."""
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
    """Return the leaves of a graph, such as parameters, whose gradients these nodes accumulate."""
    variables = (getattr(node, "variable", None) for node in nodes)
    return {variable for variable in variables if isinstance(variable, Tensor)}
