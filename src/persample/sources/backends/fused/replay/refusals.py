"""What a recorded step may not hold: whatever may be another thing in the next call, and nothing shows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from persample.sources.backends.fused.replay.errors import NotReplayableError

# What a graph may call: operations of PyTorch, and arithmetic on the sizes of tensors.
_PACKAGES = ("torch", "_operator", "builtins", "math")
_NOT_OF = ("torch._dynamo", "torch._numpy", "torch._higher_order_ops", "torch.autograd")
_METHODS_REFUSED = frozenset(
    ("register_hook", "register_post_accumulate_grad_hook", "backward", "numpy", "tolist", "item", "data_ptr", "set_")
)
_BY_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def refuse_graph(graph: GraphModule, examples: Sequence[Any]) -> None:
    """Raise if a graph of Dynamo's depends on what its guards may not see.

    Raises:
        NotReplayableError: it does.
    """
    if not all(type(t) in (Tensor, torch.nn.Parameter) and t.layout is torch.strided for t in examples):
        raise NotReplayableError("a value other than an ordinary tensor changes between calls")
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            source = getattr(node.meta.get("grapharg"), "source", None)
            if "Random" in type(source).__name__ or getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False):
                raise NotReplayableError("a Python number changes between calls")
        elif node.op == "call_method" and node.target in _METHODS_REFUSED:
            raise NotReplayableError(f"the model calls .{node.target}()")
        elif node.op == "call_function":
            _refuse_function(node.target)
        elif node.op in ("get_attr", "call_module"):
            for user in node.users:  # a part of the model that an operation takes, as activation checkpointing does
                _refuse_function(user.target)
            raise NotReplayableError(f"Dynamo has turned {node.target} into a constant")
        if any(isinstance(a, torch.Generator) for a in (*node.args, *node.kwargs.values())):
            raise NotReplayableError("the model draws from a generator of its own")
    (results,) = next(node for node in graph.graph.nodes if node.op == "output").args
    if len(results) != 1 or results[0].op == "placeholder":
        raise NotReplayableError("the forward pass keeps tensors besides the losses")


def _refuse_function(target: Any) -> None:
    package = getattr(target, "__module__", None) or ""
    if isinstance(target, torch._ops.HigherOrderOperator):
        raise NotReplayableError(f"the model has a higher-order operation ({target})")
    if package.partition(".")[0] not in _PACKAGES or package.startswith(_NOT_OF):
        raise NotReplayableError(f"the model calls {package}.{getattr(target, '__name__', target)}")


def refuse_operation(node: Node) -> None:
    """Raise if an operation of a recorded step goes by values, or by what is no operand of the step.

    Raises:
        NotReplayableError: it does.
    """
    if node.op == "get_attr" and not _is_literal(node):
        raise NotReplayableError("a tensor created during recording is part of the step")
    if node.op != "call_function":
        return
    if any(isinstance(a, torch.Generator) for a in (*node.args, *node.kwargs.values())):
        raise NotReplayableError("it draws from a generator of its own")
    if "c10d" in getattr(node.target, "namespace", ""):
        # To record takes one call more, for which the other processes, which may record later, would not be there.
        raise NotReplayableError("it exchanges tensors with other processes")
    by_values = _BY_VALUES & set(getattr(node.target, "tags", ()))
    if node.target is torch.ops.aten.index.Tensor:
        indices = [i.meta["val"].dtype for i in node.args[1] if i is not None]  # type: ignore[union-attr]
        by_values = by_values if torch.bool in indices or torch.uint8 in indices else set()
    if isinstance(node.target, torch._ops.HigherOrderOperator) or by_values:
        raise NotReplayableError(f"{node.target} goes by values")


def _is_literal(node: Node) -> bool:
    """Whether a tensor is made of numbers of Python's, as by `torch.tensor(2.0)`, and copied before anything uses it.

    Python's numbers are the same in each replay: those of the model have guards, and those of this package go by shapes
    and by what is asked for.
    """
    made_of_numbers = type(getattr(node.graph.owning_module, str(node.target))) is Tensor  # `FakeTensor` if computed
    return made_of_numbers and all(user.target is torch.ops.aten.lift_fresh_copy.default for user in node.users)
