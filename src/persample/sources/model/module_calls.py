"""Recording the calls of modules during a forward pass, and proving that nothing else uses the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from persample.errors import UnsupportedModelError
from persample.sources.batch import Batch
from persample.sources.model.refusals import FUSED_OR_VJP, describe


@dataclass(eq=False)
class ModuleCall:
    """One call of a module: `output = module(*inputs)`, before anything else can change the output in place.

    Attributes:
        path: where the module is in the model.
        module: the module.
        inputs: its tensor arguments, positional ones first.
        output: what its `forward` returned; later in-place operations may have changed its values since.
        origin: the output, or the tensor that it is a view of (`F.linear` on a sequence returns a view). Its values
            may change in place later, but not its place in the graph.
        edge: that place.
        input_nodes: the same for the inputs that have a place there.
        input_versions: the inputs' version counters, which count changes in place.
        hooks: how many hooks the output had when the call was recorded; the user may register more of them later.
    """

    path: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    output: Tensor
    origin: Tensor
    edge: GradientEdge
    input_nodes: tuple[Node, ...]
    input_versions: tuple[int, ...]
    hooks: int = 0

    @property
    def name(self) -> str:
        """The module's name in errors."""
        return describe(self.path, self.module)


@contextmanager
def recorded_calls(
    modules: Mapping[str, nn.Module], on_call: Callable[[ModuleCall], None] = lambda call: None
) -> Iterator[list[ModuleCall]]:
    """Record the calls of `modules` (by path) whose output is part of the autograd graph, in the order of the calls.

    Each call is also given to `on_call` at once, before anything can change the output in place. The hooks are the
    first to see the output, so hooks of the user that replace it come after them. After the context no further call is
    recorded, in particular none of those that activation checkpointing repeats.
    """
    calls: list[ModuleCall] = []
    own = {path: dict(module._parameters) for path, module in modules.items()}

    def hook_for(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if isinstance(output, Tensor) and output.requires_grad:
                if any(own[path].get(name) is not p for name, p in module._parameters.items()):
                    raise UnsupportedModelError(
                        f"{describe(path, module)} was called with its parameters replaced "
                        "(torch.func.functional_call, or a set attribute), which this backend does not support: "
                        f"{FUSED_OR_VJP}."
                    )
                inputs = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
                call = _call(path, module, inputs, output)
                calls.append(call)
                on_call(call)
                call.hooks = _hooks_of_output(call)

        return hook

    handles = [
        module.register_forward_hook(hook_for(path), prepend=True, with_kwargs=True) for path, module in modules.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _call(path: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> ModuleCall:
    # An operation in place on a view gives the view another node, while the node of its base remains.
    origin = output._base if output._base is not None else output
    return ModuleCall(
        path,
        module,
        inputs,
        output,
        origin,
        get_gradient_edge(origin),
        tuple(get_gradient_edge(tensor).node for tensor in inputs if tensor.requires_grad),
        tuple(tensor._version for tensor in inputs),
    )


def refuse_unseen_uses(losses: Tensor, calls: list[ModuleCall], parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise unless every path of the autograd graph from `losses` to a parameter leads through a recorded call.

    Raises:
        UnsupportedModelError: it names the parameter.
    """
    for _, reason in unseen_uses(losses, calls, parameters):
        raise UnsupportedModelError(reason)


def unseen_uses(
    losses: Tensor, calls: list[ModuleCall], parameters: Mapping[str, nn.Parameter]
) -> Iterator[tuple[str | None, str]]:
    """Yield each use outside the recorded calls: the parameter (None if it is not a single one) and the reason.

    The walk follows the graph backwards from the losses. Where it meets the output of a recorded call it goes on at
    the call's inputs, so what it still meets of the parameters is used by something that was not recorded: a
    functional call (`F.linear(x, embedding.weight)`), a bare parameter, `module.forward(x)` instead of `module(x)`.
    """
    for call in calls:
        if _hooks_of_output(call) > call.hooks:
            yield (
                None,
                f"A hook (Tensor.register_hook) on the output of {call.name} may change the gradient that this backend "
                f"takes there: put the hook on a function of the output, or {FUSED_OR_VJP}.",
            )
    names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
    for node in _nodes_outside(losses, calls):
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and variable in names:
            yield (
                names[variable],
                f"Parameter {names[variable]!r} is used outside the call of a module that this backend has a rule "
                "for (by a functional call, as a bare parameter, by a module's method, or in a derivative that the "
                f"model takes by torch.autograd.grad): its gradient would lack that use. {FUSED_OR_VJP.capitalize()}.",
            )
        if moves_rows(node):
            yield (
                None,
                f"The model selects or reorders entries of dim 0 between its layers ({node.name()}), but this backend "
                f"needs row i to be sample i. {FUSED_OR_VJP.capitalize()}.",
            )
        if "CheckpointFunction" in node.name():
            yield (
                None,
                "The model uses reentrant activation checkpointing, which hides its parameters from autograd's "
                "graph: pass use_reentrant=False to torch.utils.checkpoint.checkpoint.",
            )


def _nodes_outside(losses: Tensor, calls: list[ModuleCall]) -> Iterator[Node]:
    """Yield the nodes of the graph of `losses` that are outside the recorded calls."""
    inputs_of = {call.edge.node: call.input_nodes for call in calls}
    pending = [losses.grad_fn] if losses.grad_fn is not None else []
    seen: set[Node] = set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in inputs_of:
            pending += inputs_of[node]
            continue
        yield node
        pending += [following for following, _ in node.next_functions if following is not None]


def _hooks_of_output(call: ModuleCall) -> int:
    tensors = {id(tensor): tensor for tensor in (call.output, call.origin)}
    return sum(len(tensor._backward_hooks or ()) for tensor in tensors.values())


def moves_rows(node: Node) -> bool:
    """Whether a node of the autograd graph belongs to an operation that selects or reorders entries of dim 0."""
    kind = node.name().removesuffix("Backward0").removesuffix("Backward1")
    if kind in ("MaskedSelect", "MaskedScatter", "Take", "Put"):
        return True
    if kind in ("Index", "IndexPut"):
        first = next(iter(getattr(node, "_saved_indices", ())), None)
        # Rows 0, 1, 2, … each taken once, as in logits[torch.arange(B), labels], stay where they are.
        return first is not None and not is_range(first)
    if kind in ("IndexSelect", "IndexCopy", "IndexAdd", "IndexFill", "Gather", "Scatter", "ScatterAdd", "Sort", "Topk"):
        return bool(getattr(node, "_saved_dim", 0) == 0)
    if kind in ("Flip", "Roll"):
        return not (dims := getattr(node, "_saved_dims", ())) or 0 in dims
    return False


def is_range(index: Tensor) -> bool:
    """Whether `index` counts 0, 1, 2 and so on."""
    return (
        index.dtype != torch.bool
        and index.dim() >= 1
        and torch.equal(index.reshape(-1), torch.arange(index.numel(), device=index.device, dtype=index.dtype))
    )


def refuse_changed_inputs(call: ModuleCall) -> None:
    """Raise if an input of the call was changed in place after the call: its values there are lost."""
    if tuple(tensor._version for tensor in call.inputs) != call.input_versions:
        raise UnsupportedModelError(
            f"The input of {call.name} was changed in place after the call, so its value is lost: make that operation "
            f"out of place (inplace=False), or {FUSED_OR_VJP}."
        )


def refuse_lists(batch: Batch) -> None:
    """Raise if the model gets one tensor per sample, or rows that are not in the order of the samples."""
    if any(owners is not None for _, _, owners in batch.inputs_only().followed()):
        raise UnsupportedModelError(
            "The model gets a list with one tensor for each sample, or packed sequences, so this backend cannot tell "
            "which rows of its layers' inputs belong to which sample: pass one tensor, stacked or padded, or "
            f"{FUSED_OR_VJP}."
        )


def require_batch_first(call: ModuleCall, batch: Batch) -> None:
    """Raise unless dim 0 of all tensors of the call is the sample."""
    not_first = batch.not_first()
    for tensor in (*call.inputs, call.output):
        if tensor.dim() == 0 or len(tensor) != batch.size or any(tensor is other for other in not_first):
            raise UnsupportedModelError(
                f"{call.name} was called with a tensor of shape {tuple(tensor.shape)} in a batch of {batch.size} "
                "samples: this backend needs dim 0 of its inputs and outputs to be the sample (folded batches and "
                f"time-first layouts are not supported). {FUSED_OR_VJP.capitalize()}."
            )
