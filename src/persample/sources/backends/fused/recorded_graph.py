"""A graph of Dynamo's, run under the capture of this backend and written down as a flat list of ATen operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from persample.sources.backends.fused.accumulators import Moment
from persample.sources.backends.fused.capture import Capture
from persample.sources.backends.fused.layout import layout_of
from persample.sources.model.batch_norm_nodes import read_right

# What a graph may call: operations of PyTorch, and arithmetic on the sizes of tensors.
_PACKAGES = ("torch", "_operator", "builtins", "math")
_NOT_OF = ("torch._dynamo", "torch._numpy", "torch._higher_order_ops", "torch.autograd")
_METHODS_REFUSED = frozenset(
    ("register_hook", "register_post_accumulate_grad_hook", "backward", "numpy", "tolist", "item", "data_ptr", "set_")
)
_BY_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class NotReplayableError(Exception):
    """A step that cannot be replayed. Nothing of it was run."""


def refuse_graph(graph: GraphModule, examples: Sequence[Any]) -> None:
    """Raise if a graph of Dynamo's depends on what its guards may not see.

    Raises:
        NotReplayableError: it does.
    """
    if not all(type(t) in (Tensor, torch.nn.Parameter) and t.layout is torch.strided for t in examples):
        raise NotReplayableError("a value that is no ordinary tensor changes from call to call")
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            source = getattr(node.meta.get("grapharg"), "source", None)
            if "Random" in type(source).__name__ or getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False):
                raise NotReplayableError("a number of Python's changes from call to call")
        elif node.op == "call_method" and node.target in _METHODS_REFUSED:
            raise NotReplayableError(f"the model calls .{node.target}()")
        elif node.op == "call_function":
            _refuse_function(node.target)
        elif node.op in ("get_attr", "call_module"):
            raise NotReplayableError(f"Dynamo has made a constant of {node.target}")
        if any(isinstance(a, torch.Generator) for a in (*node.args, *node.kwargs.values())):
            raise NotReplayableError("the model draws from a generator of its own")
    (results,) = next(node for node in graph.graph.nodes if node.op == "output").args
    if len(results) != 1 or results[0].op == "placeholder":
        raise NotReplayableError("the forward pass keeps tensors besides the losses")


def _refuse_function(target: Any) -> None:
    package = getattr(target, "__module__", None) or ""
    if isinstance(target, torch._ops.HigherOrderOperator):
        raise NotReplayableError(f"the model has an operation that is made of others ({target})")
    if package.partition(".")[0] not in _PACKAGES or package.startswith(_NOT_OF):
        raise NotReplayableError(f"the model calls {package}.{getattr(target, '__name__', target)}")


def flat_graph(
    graph: GraphModule, known: Mapping[int, str | int], examples: Sequence[Tensor], size: int
) -> tuple[GraphModule, list[str]]:
    """Return the operations of forward pass, backward pass and moments, and the names of what they return.

    Args:
        graph: forward pass and loss.
        known: for each operand that is a parameter or a tensor of the batch, its name or its number there.
        examples: the operands.
        size: B.

    Returns:
        Operations on the operands that return the losses, the mean gradients and the second moments, without autograd;
        and the names of the parameters that have them.

    Raises:
        NotReplayableError: the step depends on values, or on what is not in the graph.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    reached: list[str] = []

    def moments(*inputs: Tensor) -> tuple[Tensor, ...]:
        operands = [t.detach().requires_grad_() if isinstance(known.get(i), str) else t for i, t in enumerate(inputs)]
        parameters: dict[str, Any] = {name: operands[i] for i, name in known.items() if isinstance(name, str)}
        sink = Moment(size)
        capture = Capture(parameters, size, sink)
        for i, number in known.items():
            if isinstance(number, int):
                capture.layouts[operands[i]] = layout_of(operands[i], 0, None, size)
        with capture:
            (losses,) = graph(*operands)
        losses = capture.finish(losses)
        read_right([losses])
        if losses.shape != (size,):
            raise NotReplayableError("the losses are no vector of length B")
        if losses.requires_grad:
            total = losses.sum()
            with capture.during_backward([total]):
                leaves = [capture.anchor, *parameters.values(), *capture.leaves()]
                _, *unseen = torch.autograd.grad(total, leaves, allow_unused=True)
            if any(g is not None for g in unseen):
                raise NotReplayableError("a parameter is used by an operation that is not seen")
        sink.finish()
        if capture.intercepted or capture.without_gradient or capture.rounds_otherwise:
            raise NotReplayableError("the model uses parameters where autograd does not look")
        reached.extend(sink.total)
        if sink.total:
            torch._foreach_div_([*sink.total.values(), *sink.squares.values()], size)
        dtypes = {name: p.dtype for name, p in parameters.items()}
        results = [value.to(dtypes[n]) for sums in (sink.total, sink.squares) for n, value in sums.items()]
        return losses.detach(), *results

    recorded = make_fx(moments, tracing_mode="fake")(*[t.detach() for t in examples])
    for node in recorded.graph.nodes:
        if node.op == "call_function":
            _refuse_operation(node)
    return recorded, reached


def _refuse_operation(node: torch.fx.Node) -> None:
    by_values = _BY_VALUES & set(getattr(node.target, "tags", ()))
    if node.target is torch.ops.aten.index.Tensor:
        indices = [i.meta["val"].dtype for i in node.args[1] if i is not None]  # type: ignore[union-attr]
        by_values = by_values if torch.bool in indices or torch.uint8 in indices else set()
    if isinstance(node.target, torch._ops.HigherOrderOperator) or by_values:
        raise NotReplayableError(f"{node.target} goes by values")
