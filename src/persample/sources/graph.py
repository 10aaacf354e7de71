"""Walking the autograd graph of the losses."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.autograd.graph import Node


def nodes_behind(losses: Tensor) -> set[Node]:
    """Return all nodes of the autograd graph of `losses`."""
    found: set[Node] = set()
    pending = [losses.grad_fn] if losses.grad_fn is not None else []
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += [following for following, _ in node.next_functions if following is not None]
    return found


def variables_of(nodes: Iterable[Node]) -> set[Tensor]:
    """Return the leaves of a graph, such as parameters, whose gradients these nodes accumulate."""
    variables = (getattr(node, "variable", None) for node in nodes)
    return {variable for variable in variables if isinstance(variable, Tensor)}
