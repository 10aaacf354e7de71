"""The values of constants while a step is recorded on tensors without values: positions, as models look them up.

What a forward pass makes of Python's numbers alone, by `torch.arange`, is the same in each of its calls, as Dynamo
guards these numbers. What it makes of a buffer is the same as long as the buffer is, which is looked at in each call.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

_MAKING = frozenset((torch.arange,))
_CHANGING = frozenset(
    (operator.add, operator.getitem, operator.mul, operator.sub, torch.gather, torch.unsqueeze, torch.reshape)
)
_METHODS = frozenset(
    ("contiguous", "expand", "expand_as", "flatten", "gather", "long", "reshape", "squeeze", "to", "unsqueeze", "view")
)
_MOST_ENTRIES = 2**16  # of a buffer, which is compared in each call


class _Known(NamedTuple):
    """A value.

    Attributes:
        value: the value.
        behind: the numbers of the operands of the graph that it is made of.
        looked_at: takes these numbers when something goes by the value.
    """

    value: Tensor
    behind: frozenset[int]
    looked_at: set[int]


_known = WeakIdKeyDictionary()


def all_different(indices: Tensor) -> bool:
    """Whether no entry occurs twice."""
    known: _Known | None = _known.get(indices)
    if known is None:
        return _are_different(indices)
    known.looked_at.update(known.behind)
    with _disable_current_modes():
        return _are_different(known.value)


def _are_different(indices: Tensor) -> bool:
    return bool(indices.unique().numel() == indices.numel())


class WithKnownValues(Interpreter):
    """Runs a graph of Dynamo's on tensors without values, and remembers those of constants.

    Args:
        graph: the graph.
        given: operands with their values, by their number, that are the same in each call, or are looked at.

    Attributes:
        looked_at: the numbers of the operands whose values something went by.
    """

    def __init__(self, graph: GraphModule, given: Mapping[int, Tensor] | None = None) -> None:
        super().__init__(graph)
        self.extra_traceback = False
        self.looked_at: set[int] = set()
        self._values: dict[Node, _Known] = {}
        operands = [node for node in graph.graph.nodes if node.op == "placeholder"]
        written = _written(graph)
        self._given = {
            operands[number]: _Known(value, frozenset((number,)), self.looked_at)
            for number, value in (given or {}).items()
            if operands[number] not in written
        }
        self._written = written

    def fetch_args_kwargs_from_env(self, n: Node) -> Any:
        """Return the arguments of an operation, in lists as those of a model are."""
        return _in_lists(super().fetch_args_kwargs_from_env(n))

    def run_node(self, n: Node) -> Any:
        """Run one operation."""
        result = super().run_node(n)
        known = self._given.get(n)
        if known is None and isinstance(result, Tensor) and self._is_constant(n):
            known = self._computed(n)
        if known is not None:
            _known[result] = self._values[n] = known
        return result

    def _computed(self, n: Node) -> _Known:
        """Return the value of an operation on constants."""
        with _disable_current_modes():
            args, kwargs = torch.fx.node.map_arg((n.args, dict(n.kwargs)), lambda node: self._values[node].value)
            function: Any = getattr(Tensor, str(n.target)) if n.op == "call_method" else n.target
            behind = [self._values[node].behind for node in n.all_input_nodes]
            return _Known(function(*args, **kwargs), frozenset().union(*behind), self.looked_at)

    def _is_constant(self, n: Node) -> bool:
        if n in self._written:
            return False
        if n.op == "call_function" and n.target in _MAKING:
            return not n.all_input_nodes
        keeps = n.target in (_CHANGING if n.op == "call_function" else _METHODS)
        return keeps and bool(n.all_input_nodes) and all(node in self._values for node in n.all_input_nodes)


def same_in_each_call(operands: Sequence[Tensor], changing: Sequence[int]) -> dict[int, Tensor]:
    """Return the operands that may be taken for constants, as buffers of positions are, by their number.

    Args:
        operands: all.
        changing: the numbers of those that are others in each call.
    """
    memories = [t.untyped_storage().data_ptr() for t in operands]
    return {
        number: t
        for number, t in enumerate(operands)
        if number not in changing
        and not (t.is_floating_point() or t.is_complex())
        and t.device.type == "cpu"
        and 0 < t.numel() <= _MOST_ENTRIES
        and memories.count(memories[number]) == 1
    }


def _written(graph: GraphModule) -> set[Node]:
    """Return the values that share memory with what an operation writes into."""
    targets = [
        node.all_input_nodes if node.kwargs else node.all_input_nodes[:1] for node in filter(_writes, graph.graph.nodes)
    ]
    memories = {_memory(node) for nodes in targets for node in nodes}
    return {node for node in graph.graph.nodes if memories and (None in memories or _memory(node) in memories)}


def _memory(node: Node) -> int | None:
    """Return what tells the memory of a value of Dynamo's from others; None if that is not known."""
    value = node.meta.get("example_value")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _writes(node: Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    name = str(getattr(node.target, "__name__", node.target))
    if getattr(node.target, "__module__", None) == operator.iadd.__module__:  # whose `and_` writes nothing
        of_the_same = (name[1:], f"{name[1:]}_")
        return name == "setitem" or (name.startswith("i") and any(hasattr(operator, other) for other in of_the_same))
    return name.endswith("_") or bool(node.kwargs.get("inplace")) or "out" in node.kwargs


def _in_lists(tree: Any) -> Any:
    if isinstance(tree, list):
        return [_in_lists(item) for item in tree]
    if type(tree) is tuple:
        return tuple([_in_lists(item) for item in tree])
    return {key: _in_lists(item) for key, item in tree.items()} if isinstance(tree, dict) else tree
