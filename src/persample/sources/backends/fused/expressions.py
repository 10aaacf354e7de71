"""Tensors computed from parameters alone: a transpose, a slice, a low-rank product, a masked or normalised weight.

An operation on samples may use such an expression θ' = f(θ) in place of a parameter. Its gradients g'_i are then pulled
back through f sample by sample, g_i = (∂f/∂θ)ᵀ g'_i. Where f only puts entries in another order, each at most once,
squaring commutes with it, and sums can be pulled back in place of single samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from persample.errors import UnsupportedModelError
from persample.sources.backends.fused.arguments import memory_of, substitute, tensors_in
from persample.sources.backends.fused.known_values import all_different
from persample.sources.backends.fused.op_table import RESHAPES, SAME, functions, name_of
from persample.sources.backends.fused.tracked import saved_tensors_are_intercepted
from persample.sources.model.autograd_graph import nodes_behind


class Made(NamedTuple):
    """How an expression was made.

    Attributes:
        func: the operation.
        args: its positional arguments, as the model gave them,
        kwargs: and its keyword arguments.
        number: which of its results the expression is; None if it has but one.
        sources: those of its operands that were expressions, by their id.
        versions: how often each of its other operands had been written into, by its id.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    number: int | None
    sources: Mapping[int, Expression]
    versions: Mapping[int, int]


@dataclass(eq=False, slots=True)
class Expression:
    """θ' = f(θ).

    Attributes:
        value: θ', detached.
        graph: θ' with its autograd graph back to the parameters; the parameter itself where f is the identity.
        parameters: the parameters θ that it depends on, by name.
        moves: whether f only moves entries of one parameter, or leaves them away.
        repeats: the dimensions along which θ' is the same over and over, with the length of what is repeated.
        is_parameter: whether f is the identity.
        through: other expressions that the graph begins at, by the leaves that stand for them.
        made: how it was made; None if that does not matter.
    """

    value: Tensor
    graph: Tensor
    parameters: Mapping[str, nn.Parameter]
    moves: bool
    repeats: Mapping[int, int] = field(default_factory=dict)
    is_parameter: bool = False
    through: Mapping[Tensor, Expression] = field(default_factory=dict)
    made: Made | None = None

    @property
    def reorders(self) -> bool:
        """Whether f only moves entries of one parameter, and repeats none."""
        return self.moves and not self.repeats

    @property
    def span(self) -> tuple[int, int] | None:
        """The first and the last entry in the memory of one parameter that θ' is a view of; None if it is no view."""
        parameter = next(iter(self.parameters.values()))
        shared = memory_of(self.value) == memory_of(parameter)
        if not self.reorders or not shared or not parameter.is_contiguous() or self.value.numel() == 0:
            return None
        first = int(self.value.storage_offset() - parameter.storage_offset())
        steps = zip(self.value.shape, self.value.stride(), strict=True)
        return first, first + sum((size - 1) * step for size, step in steps)

    def entries(self, values: Tensor) -> Tensor:
        """Return the entries of `values`, shaped as the parameter, that θ' views; requires a `span`."""
        offset = self.value.storage_offset() - next(iter(self.parameters.values())).storage_offset()
        return values.as_strided(self.value.shape, self.value.stride(), values.storage_offset() + offset)

    def once(self, dim: int) -> Expression:
        """Return one copy of what is repeated along `dim`."""
        length = self.repeats[dim]
        graph = self._before_repeated(dim)
        if graph is None or graph.shape[dim] != length or graph.dim() != self.value.dim():
            graph = self.graph.narrow(dim, 0, length)
        repeats = {d: size for d, size in self.repeats.items() if d != dim}
        return Expression(graph.detach(), graph, self.parameters, self.moves, repeats, through=self.through)

    def _before_repeated(self, dim: int) -> Tensor | None:
        """Return one copy of what is repeated along `dim`, by a graph without the repetitions if possible."""
        if self.made is None or len(self.made.sources) != 1 or self.value.numel() == 0:
            return None
        ((key, source),) = self.made.sources.items()
        if self.made.func in _COPIES:
            if dim not in source.repeats:
                return None
            args, kwargs = substitute((self.made.args, dict(self.made.kwargs)), {key: source.once(dim).graph})
            copy: Tensor = self.made.func(*args, **kwargs)
            return copy
        if self.made.func not in _EXPANSIONS:
            return None
        missing = self.value.dim() - source.value.dim()
        lengths = [1] * missing + list(source.value.shape)
        times = [size // length for size, length in zip(self.value.shape, lengths, strict=True)]
        inherited = times[dim] == 1
        times[dim] = 1
        return (source.once(dim - missing) if inherited else source).graph.repeat(times)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters."""
        return tuple(self.parameters)

    @property
    def width(self) -> int:
        """Size of one sample's gradients, in numbers."""
        return self.value.numel() + sum(math.prod(p.shape) for p in self.parameters.values())

    def pull(self, gradient: Tensor) -> dict[str, Tensor]:
        """Return (∂f/∂θ)ᵀ `gradient` for each parameter; `gradient` has the shape of θ'."""
        if self.is_parameter:
            return {self.names[0]: gradient}
        return self._grad(gradient, batched=False)

    def pull_rows(self, gradients: Tensor) -> dict[str, Tensor]:
        """Return the same for several gradients at once; `gradients` and the results have a leading dimension."""
        if self.is_parameter:
            return {self.names[0]: gradients}
        nodes = nodes_behind(self.graph)
        if not any("Sparse" in node.name() or isinstance(node, BackwardCFunction) for node in nodes):
            return self._grad(gradients, batched=True)
        # A custom function may do in its backward pass what cannot be mapped over the samples; sparse products do.
        rows = [self._grad(gradient, batched=False) for gradient in gradients]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _grad(self, gradients: Tensor, *, batched: bool) -> dict[str, Tensor]:
        found = torch.autograd.grad(
            self.graph,
            [*self.parameters.values(), *self.through],
            gradients.to(self.graph.dtype),
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )
        pulled = {name: g for name, g in zip(self.parameters, found, strict=False) if g is not None}
        for source, gradient in zip(self.through.values(), found[len(self.parameters) :], strict=True):
            if gradient is not None:
                for name, g in (source.pull_rows if batched else source.pull)(gradient).items():
                    pulled[name] = pulled[name] + g if name in pulled else g
        return pulled


def origins(sources: Collection[Expression]) -> tuple[dict[str, nn.Parameter], dict[Tensor, Expression]]:
    """Return `parameters` and `through` for the expression of a tensor computed from `sources`."""
    parameters = {name: p for source in sources for name, p in source.parameters.items()}
    through = {leaf: inner for source in sources for leaf, inner in source.through.items()}
    return parameters, through


def express(
    func: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    sources: Mapping[int, Expression],
    remember: Callable[[Expression], Tensor],
) -> Any:
    """Run an operation on parameters and constants alone.

    Args:
        func: the operation.
        args: its positional arguments,
        kwargs: and its keyword arguments.
        sources: those of its operands that are expressions, by their id.
        remember: is given each result that is an expression again, and returns what the model sees of it.

    Raises:
        UnsupportedModelError: the operation changes an expression in place.
    """
    name = name_of(func)
    new_args, new_kwargs = substitute((args, dict(kwargs)), {key: source.graph for key, source in sources.items()})
    before = [source.graph._version for source in sources.values()]
    with own_saved_tensors():
        result = func(*new_args, **new_kwargs)
    if [source.graph._version for source in sources.values()] != before:
        raise UnsupportedModelError(
            f"{name} changes a parameter, or a tensor computed from parameters, in place, which backend 'fused' "
            "cannot follow: use the out-of-place operation."
        )
    # `contiguous`, `to` and others return what they are given if that will do.
    unchanged = {id(source.graph): t for t in tensors_in((args, dict(kwargs))) if (source := sources.get(id(t)))}
    parameters, through = origins(sources.values())
    source = next(iter(sources.values()))
    versions = {id(t): version_of(t) for t in tensors_in((args, dict(kwargs))) if id(t) not in sources}

    def expression(output: Any, number: int | None = None) -> Any:
        if not isinstance(output, Tensor) or not output.requires_grad:
            return output
        if id(output) in unchanged:
            return unchanged[id(output)]
        repeats = _repeats(func, source, output)
        moves = len(sources) == 1 and source.moves and _moves(func, source, args, kwargs)
        made = Made(func, args, kwargs, number, sources, versions)
        return remember(Expression(output.detach(), output, parameters, moves, repeats, through=through, made=made))

    if isinstance(result, tuple | list):
        outputs = [expression(output, number) for number, output in enumerate(result)]
        return type(result)(*outputs) if hasattr(result, "_fields") else type(result)(outputs)
    return expression(result)


def version_of(tensor: Tensor) -> int:
    """Version counter: how often the tensor was written to."""
    return 0 if tensor.is_inference() else tensor._version


@contextmanager
def own_saved_tensors() -> Iterator[None]:
    """Save what the graph of an expression needs as usual, even within activation checkpointing.

    Expressions are pulled back when the backward pass is over, and nobody repeats the forward pass any more.
    """
    if not saved_tensors_are_intercepted():
        yield
    else:
        with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda saved: saved):
            yield


_EXPANSIONS = functions("expand expand_as broadcast_to repeat tile")
_COPIES = SAME - functions("dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout prelu rrelu")
_VIEWS = functions(
    "permute transpose swapaxes swapdims movedim moveaxis t T mT narrow select chunk split unbind squeeze unsqueeze"
)


def _repeats(func: Any, source: Expression, output: Tensor) -> Mapping[int, int]:
    """Return the dimensions along which the result of an operation on `source` repeats."""
    if func in _COPIES:
        return source.repeats
    missing = output.dim() - source.value.dim()
    found = {d: 1 for d, size in enumerate(output.shape) if size > 1 and output.stride(d) == 0}
    if func in _EXPANSIONS:
        lengths = [1] * missing + list(source.value.shape)
        found |= {d + missing: length for d, length in source.repeats.items()}
        found |= {d: n for d, (n, size) in enumerate(zip(lengths, output.shape, strict=True)) if n != size}
    return found


def _moves(func: Any, source: Expression, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation on one parameter only moves its entries, with no repeats other than those of `_repeats`."""
    if func in _EXPANSIONS or func in _COPIES:
        return all(d not in source.repeats for d in range(source.value.dim())) or func in _COPIES
    # A view of entries repeated by a stride of zero shows that stride; other copies would not be noticed any more.
    if any(source.value.stride(d) != 0 for d in source.repeats):
        return False
    if func in _VIEWS or (func in RESHAPES and not source.repeats):
        return True
    if func is Tensor.__getitem__:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return all(type(i) is int or isinstance(i, slice) or i is None or i is Ellipsis or _is_number(i) for i in index)
    if func is F.embedding and isinstance(args[0], Tensor) and not source.repeats:
        # Looking up each row at most once, as position embeddings do, is a slice in another order. To see that on a
        # GPU would be to wait for it; there the gradients of all samples are formed.
        known = args[0].device.type == "cpu" and len(args) == 2 and kwargs.get("padding_idx") is None
        return known and args[0].numel() <= len(source.value) and all_different(args[0])
    return False


def _is_number(index: Any) -> bool:
    """Whether an index is one number, though a tensor."""
    whole = isinstance(index, Tensor) and not (index.is_floating_point() or index.is_complex())
    return whole and index.dim() == 0 and index.dtype is not torch.bool
