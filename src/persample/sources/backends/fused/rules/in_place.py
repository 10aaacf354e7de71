"""In-place operations that involve parameters.

Constants, or an expression, into which parameters are written are an expression from then on. An expression into which
samples are written becomes samples. Where parameters change samples, an operation that returns a new tensor does the
work, and its result is copied back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from persample.errors import UnsupportedModelError
from persample.sources.backends.fused.arguments import memory_of, substitute, tensors_in
from persample.sources.backends.fused.expressions import Expression, origins, own_saved_tensors
from persample.sources.backends.fused.op_table import RESHAPES_IN_PLACE, functions, is_in_place, name_of
from persample.sources.backends.fused.propagation.after import after
from persample.sources.backends.fused.propagation.call import Call
from persample.sources.backends.fused.rules.expanded import axis_in, copied
from persample.sources.backends.fused.trace import Trace
from persample.sources.model.refusals import VMAP_OR_VJP


def writes(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation changes the entries of its first operand."""
    return is_in_place(func) and func not in _LEAVE_ENTRIES and isinstance(args[0], Tensor)


_LEAVE_ENTRIES = RESHAPES_IN_PLACE | functions("requires_grad_ detach_")


def write_parameters(trace: Trace, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run an in-place operation on parameters and constants alone.

    Expressions that share memory with the one that is changed, as views of one tensor do, change with it.

    Raises:
        UnsupportedModelError: other tensors share the memory.
    """
    target, arguments = args[0], (args, dict(kwargs))
    sources = {id(t): e for t in tensors_in(arguments) if (e := trace.expression(t)) is not None}
    graphs = {key: source.graph for key, source in sources.items()}
    sharing = _sharing_memory(trace, func, args, kwargs)
    with own_saved_tensors():
        copies = _copied(func, target, sharing)
        new_args, new_kwargs = substitute(arguments, graphs | {id(target): copies[id(target)]})
        func(*new_args, **new_kwargs)
    if id(target) not in sources or not target.is_leaf:
        # With its graph, so that a use of what shares the constants' memory is noticed as one of the parameter.
        new_args, new_kwargs = substitute(arguments, {key: g for key, g in graphs.items() if key != id(target)})
        func(*new_args, **new_kwargs)
    parameters, through = origins(sources.values())
    changed: dict[Expression, Expression] = {}
    for t, e in sharing:
        graph = copies[id(t)]
        if t.is_leaf and t.requires_grad:
            t.data = graph.detach()
        made = None
        if changed and e.made is not None:  # a view is one of what has changed
            made = e.made._replace(sources={key: changed[source] for key, source in e.made.sources.items()})
        changed[e] = Expression(
            graph.detach(), graph, {**e.parameters, **parameters}, False, through={**e.through, **through}, made=made
        )
        trace.put(t, changed[e])
    return target


def _sharing_memory(
    trace: Trace, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[tuple[Tensor, Expression]]:
    """Return the operand that is changed and all that share its memory, with their expressions, as they were made.

    Raises:
        UnsupportedModelError: the others are not all computed from parameters.
    """
    target = args[0]
    expression = trace.expression(target)
    if expression is None:
        if target._base is not None:
            raise _sharing(func)
        return [(target, Expression(target, target, {}, moves=False))]
    if expression.is_parameter:
        func(*args, **kwargs)  # PyTorch forbids it, in its own words
    memory = memory_of(expression.value)
    if any(memory_of(alias) == memory for alias in trace.aliases):
        raise _sharing(func)
    return [
        (t, e)
        for t, e in trace.expressions.values()
        if e is expression or (e.value.numel() and memory_of(e.value) == memory)
    ]


def _copied(func: Any, target: Tensor, sharing: Sequence[tuple[Tensor, Expression]]) -> dict[int, Tensor]:
    """Return a copy of the graph of the first, and of the others as views of that, by the ids of the tensors.

    Raises:
        UnsupportedModelError: another is no view of the first; or the first is a parameter, or shares memory with
            constants, and a view of it is `target`, which is to be changed.
    """
    (first, whole), *views = sharing
    if first is not target and (whole.is_parameter or not first.is_leaf):
        raise _sharing(func)
    copies = {id(first): whole.graph.clone()}
    known = {whole}
    for t, e in views:
        if not t.is_leaf or e.made is None or not known.issuperset(e.made.sources.values()):
            raise _sharing(func)
        args, kwargs = substitute((e.made.args, dict(e.made.kwargs)), copies)
        result = e.made.func(*args, **kwargs)
        copies[id(t)] = result if e.made.number is None else result[e.made.number]
        if memory_of(copies[id(t)]) != memory_of(copies[id(first)]):
            raise _sharing(func)
        known.add(e)
    return copies


def write_samples(trace: Trace, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation that writes samples into an expression of parameters.

    Raises:
        UnsupportedModelError: other tensors share its memory, or it is unknown where it has entries for the samples.
    """
    target = args[0]
    if len(_sharing_memory(trace, func, args, kwargs)) > 1:
        raise _sharing(func)
    values, named = trace.values((args, dict(kwargs)))
    where = after(Call(func, values, named, trace.samples_in(args, kwargs), trace.batch_size))[0]
    layout = trace.known(where, name_of(func), target.shape)
    copies = copied(trace, target, target.dim(), layout, axis_in(layout, target.shape))
    if target.requires_grad:
        target.detach_()
    # Memory of its own, because what its expression was made of must stay as it is.
    target.data = trace.expressions.pop(id(target))[1].value.clone()
    trace.follow_as(target.copy_(copies), layout)
    return trace.again(func, args, kwargs, {})


def change_samples(trace: Trace, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation that changes samples in place by parameters."""
    name = name_of(func).removesuffix("_")
    new = next((found for space in (Tensor, torch, F) if callable(found := getattr(space, name, None))), None)
    if new is None:
        raise UnsupportedModelError(
            f"{name_of(func)} changes samples in place by a parameter, which backend 'fused' cannot follow: use the "
            "out-of-place operation, or backend 'vjp'."
        )
    with trace:
        return args[0].copy_(new(args[0].clone(), *args[1:], **kwargs))


def fill(trace: Trace, x: Tensor, value: Tensor) -> Any:
    """`x.fill_(parameter)`."""
    return trace.again(Tensor.copy_, (x, value), {}, {})


def written_into(trace: Trace, x: Tensor, index: Any, value: Tensor) -> None:
    """`x[index] = parameter`."""
    trace.again(Tensor.__setitem__, (x, index, _for_places(trace, x, index, value)), {}, {})


def index_put(trace: Trace, input: Tensor, indices: Any, values: Tensor, accumulate: bool = False) -> Any:
    """A copy of x with the parameter written or added to it."""
    if trace.expression(input) is not None:
        return trace.fall_back(torch.index_put, (input, indices, values), {"accumulate": accumulate})
    copies = _for_places(trace, input, tuple(indices), values)
    return trace.again(torch.index_put, (input, indices, copies), {"accumulate": accumulate}, {})


def _for_places(trace: Trace, x: Tensor, index: Any, value: Tensor) -> Tensor:
    """Return `value`, computed from parameters, expanded to the samples that own entries of `x[index]`."""
    shape = x.detach()[index].shape
    samples = trace.samples_in((x, index), {})
    where = after(Call(Tensor.__getitem__, (x, index), {}, samples, trace.batch_size))[0]
    layout = trace.known(where, "__setitem__", shape)
    return copied(trace, value, len(shape), layout, axis_in(layout, shape))


def _sharing(func: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name_of(func)} changes in place a tensor that shares memory with others (a slice, a view), with parameters "
        "involved, which backend 'fused' cannot follow: call .clone() first, assign to the whole tensor by index "
        f"(x[...] = values), use the out-of-place operation, or {VMAP_OR_VJP}."
    )
