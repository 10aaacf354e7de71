"""The values of constants while a step is recorded on tensors without values: positions made by `torch.arange`.

What a forward pass makes of Python's numbers alone is the same in each of its calls, as Dynamo guards these numbers.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

_MAKING = frozenset((torch.arange,))
_CHANGING = frozenset((operator.add, operator.getitem, operator.mul, operator.sub, torch.unsqueeze, torch.reshape))
_METHODS = frozenset(("expand", "expand_as", "flatten", "long", "reshape", "squeeze", "to", "unsqueeze", "view"))

_known = WeakIdKeyDictionary()


def all_different(indices: Tensor) -> bool:
    """Whether no entry occurs twice."""
    value: Tensor | None = _known.get(indices)
    if value is None:
        return _are_different(indices)
    with _disable_current_modes():
        return _are_different(value)


def _are_different(indices: Tensor) -> bool:
    return bool(indices.unique().numel() == indices.numel())


class WithKnownValues(Interpreter):
    """Runs a graph of Dynamo's on tensors without values, and remembers those of constants."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.extra_traceback = False
        # A constant that is written into, or a view of it, is none.
        self._watched = not any(map(_writes, graph.graph.nodes))
        self._values: dict[Node, Tensor] = {}

    def fetch_args_kwargs_from_env(self, n: Node) -> Any:
        """Return the arguments of an operation, in lists as those of a model are."""
        return _in_lists(super().fetch_args_kwargs_from_env(n))

    def run_node(self, n: Node) -> Any:
        """Run one operation."""
        result = super().run_node(n)
        if self._watched and isinstance(result, Tensor) and self._is_constant(n):
            with _disable_current_modes():
                args, kwargs = torch.fx.node.map_arg((n.args, dict(n.kwargs)), self._values.__getitem__)
                function: Any = getattr(Tensor, str(n.target)) if n.op == "call_method" else n.target
                _known[result] = self._values[n] = function(*args, **kwargs)
        return result

    def _is_constant(self, n: Node) -> bool:
        if n.op == "call_function" and n.target in _MAKING:
            return not n.all_input_nodes
        keeps = n.target in (_CHANGING if n.op == "call_function" else _METHODS)
        return keeps and bool(n.all_input_nodes) and all(node in self._values for node in n.all_input_nodes)


def _writes(node: Node) -> bool:
    name = str(getattr(node.target, "__name__", node.target))
    in_place = name == "setitem" or (name.startswith("i") and hasattr(operator, f"__{name}__"))
    return node.op in ("call_function", "call_method") and (in_place or name.endswith("_"))


def _in_lists(tree: Any) -> Any:
    if isinstance(tree, list):
        return [_in_lists(item) for item in tree]
    if type(tree) is tuple:
        return tuple([_in_lists(item) for item in tree])
    return {key: _in_lists(item) for key, item in tree.items()} if isinstance(tree, dict) else tree
