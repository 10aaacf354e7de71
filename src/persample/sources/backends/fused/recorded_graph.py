"""A graph of Dynamo's, run under the capture of this backend and written down as a flat list of ATen operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from persample.sources.backends.fused.known_values import WithKnownValues
from persample.sources.backends.fused.tidying import tidy
from persample.sources.model.batch_norm_nodes import read_right

# What a graph may call: operations of PyTorch, and arithmetic on the sizes of tensors.
_PACKAGES = ("torch", "_operator", "builtins", "math")
_NOT_OF = ("torch._dynamo", "torch._numpy", "torch._higher_order_ops", "torch.autograd")
_METHODS_REFUSED = frozenset(
    ("register_hook", "register_post_accumulate_grad_hook", "backward", "numpy", "tolist", "item", "data_ptr", "set_")
)
_BY_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class NotReplayableError(Exception):
    """The step cannot be replayed; nothing of it was run."""


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
            raise NotReplayableError(f"Dynamo has turned {node.target} into a constant")
        if any(isinstance(a, torch.Generator) for a in (*node.args, *node.kwargs.values())):
            raise NotReplayableError("the model draws from a generator of its own")
    (results,) = next(node for node in graph.graph.nodes if node.op == "output").args
    if len(results) != 1 or results[0].op == "placeholder":
        raise NotReplayableError("the forward pass keeps tensors besides the losses")


def guard_identities(given: Sequence[str]) -> None:
    """Let Dynamo, which is capturing, guard the identity of objects of which it would guard the type.

    `config.kind is KIND` goes by it.

    Args:
        given: the names of variables that are others in each call.
    """
    from torch._dynamo.guards import GuardBuilder
    from torch._guards import TracingContext

    guards = TracingContext.get().guards_context.dynamo_guards
    for guard in [*guards]:
        if guard.inner_create_fn() is GuardBuilder.TYPE_MATCH and not guard.name.startswith(
            tuple(f"L['{name}']" for name in given)
        ):
            guards.add(guard.originating_source.make_guard(GuardBuilder.ID_MATCH))


def _refuse_function(target: Any) -> None:
    package = getattr(target, "__module__", None) or ""
    if isinstance(target, torch._ops.HigherOrderOperator):
        raise NotReplayableError(f"the model has a higher-order operation ({target})")
    if package.partition(".")[0] not in _PACKAGES or package.startswith(_NOT_OF):
        raise NotReplayableError(f"the model calls {package}.{getattr(target, '__name__', target)}")


#: Computes what is wanted, from losses and operands: the tensors of it.
Compute = Callable[[Callable[[], Tensor], Sequence[Tensor]], Sequence[Tensor]]


def flat_graph(graph: GraphModule, examples: Sequence[Tensor], trained: Sequence[int], compute: Compute) -> GraphModule:
    """Return the operations of a whole step, without autograd.

    Args:
        graph: forward pass and loss, a function of the first operands.
        examples: all operands.
        trained: the numbers of those that are parameters of which gradients are wanted.
        compute: computes what is wanted.

    Raises:
        NotReplayableError: the step depends on values, or on what is not in the graph.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    taken = sum(node.op == "placeholder" for node in graph.graph.nodes)

    def step(*inputs: Tensor) -> list[Tensor]:
        operands = list(inputs)
        for i in trained:
            operands[i] = inputs[i].detach().requires_grad_()

        def losses() -> Tensor:
            (found,) = WithKnownValues(graph).run(*operands[:taken])
            read_right([found])
            return found  # type: ignore[no-any-return]

        return list(compute(losses, operands))

    recorded = make_fx(step, tracing_mode="fake")(*[t.detach() for t in examples])
    for node in recorded.graph.nodes:
        _refuse_operation(node)
    tidy(recorded)
    return recorded


def _refuse_operation(node: torch.fx.Node) -> None:
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


def _is_literal(node: torch.fx.Node) -> bool:
    """Whether a tensor is made of numbers of Python's, as by `torch.tensor(2.0)`, and copied before anything uses it.

    Python's numbers are the same in each replay: those of the model have guards, and those of this package go by shapes
    and by what is asked for.
    """
    made_of_numbers = type(getattr(node.graph.owning_module, str(node.target))) is Tensor  # `FakeTensor` if computed
    return made_of_numbers and all(user.target is torch.ops.aten.lift_fresh_copy.default for user in node.users)
