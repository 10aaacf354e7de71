"""Taking out of a recorded step what changes nothing: other names of the same tensor, and results that nobody takes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

_aten = torch.ops.aten

# A view of the same shape and strides is the same tensor once more, where there is no autograd.
_VIEWS = frozenset(
    (_aten.alias.default, _aten.detach.default, _aten.expand.default, _aten.view.default, _aten._unsafe_view.default)
)


def tidy(recorded: GraphModule) -> None:
    """Leave out of a graph of ATen operations, made by `make_fx`, those that need not be run."""
    nodes = recorded.graph.nodes
    if any(torch.Tag.inplace_view in getattr(node.target, "tags", ()) for node in nodes):
        return  # the shape of one of the names may change, and that of the others does not
    for node in nodes:
        if node.op == "call_function" and node.target in _VIEWS and _is_its_input(node):
            node.replace_all_uses_with(node.args[0])
    for node in reversed(nodes):
        if not node.users and _is_pure(node):
            recorded.graph.erase_node(node)
    recorded.recompile()


def _is_its_input(view: Node) -> bool:
    """Whether what follows may take the input instead: it is the same, and neither an operand nor a result.

    An operand may be a parameter, which is not of the type `Tensor`. Each result is a tensor of its own.
    """
    (given, *_) = view.args
    if not isinstance(given, Node) or given.op == "placeholder" or any(user.op == "output" for user in view.users):
        return False
    before, after = given.meta.get("val"), view.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    return before.shape == after.shape and before.stride() == after.stride()


def _is_pure(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    schema = node.target._schema  # what returns nothing is there for its effect, as an assertion is
    return bool(schema.returns) and not schema.is_mutable and torch.Tag.nondeterministic_seeded not in node.target.tags
