"""Trying the ways to find where the samples are after an operation, and remembering what was found."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from persample.sources.backends.fused import op_table
from persample.sources.backends.fused.arguments import substitute, tensors_in
from persample.sources.backends.fused.indexing import is_mask
from persample.sources.backends.fused.propagation.by_index import read_by_index, written_by_index
from persample.sources.backends.fused.propagation.by_labels import by_labels
from persample.sources.backends.fused.propagation.by_name import by_name, unobserved
from persample.sources.backends.fused.propagation.by_sums import by_sums
from persample.sources.backends.fused.propagation.by_trial import by_trial
from persample.sources.backends.fused.propagation.call import Call, Unknown
from persample.sources.backends.fused.propagation.lost import NO_TRACE, Where
from persample.sources.backends.fused.propagation.remembered import fingerprint_of, key_of, may_decide

Dependence = Literal["shapes", "constants", "samples"]
"""What an answer depends on besides the operation: shapes and layouts alone, or also the values of these tensors."""

_found: dict[Hashable, list[Where]] = {}
_by_constants: set[Hashable] = set()  # the keys of calls whose answers depend on the values of constants, too
_MOST_FOUND = 10_000
_MOST_VALUES = 2**20


def after(call: Call) -> list[Where]:
    """Return where the samples are in the outputs of `call`, of which at least one operand has a layout."""
    shapes = key_of(call)
    key = (shapes, fingerprint_of(call)) if shapes in _by_constants else shapes
    found = _found.get(key)
    if found is None:
        found, dependence = _find(call)
        if shapes is not None and dependence != "samples":
            if len(_found) >= _MOST_FOUND:
                _found.clear()
            if dependence == "constants":
                _by_constants.add(shapes)
                key = (shapes, fingerprint_of(call))
            _found[key] = found
    return found


def _find(call: Call) -> tuple[list[Where], Dependence]:
    """Return where the samples are in the outputs, and what that depends on."""
    try:
        return by_name(call), "shapes"
    except Unknown:
        pass
    stand_in = _with_values(call)
    if stand_in is not None:
        with _disable_current_modes():
            found, dependence = _tried(stand_in)
        if dependence == "shapes":
            return found, dependence
    return _tried(call)


def _with_values(call: Call) -> Call | None:
    """Return the call of a step that is being recorded, on numbers in place of tensors without values.

    They show where entries go as far as that depends on shapes. None if the call has values, or no such numbers do.
    """
    operands = tensors_in(call.arguments)
    if not any(isinstance(t, FakeTensor) for t in operands) or any(t.layout is not torch.strided for t in operands):
        return None
    if any(layout.owners is not None for layout in call.samples.values()):
        return None
    with _disable_current_modes():
        numbers = {
            id(t): torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(
                torch.linspace(0.5, 1.5, t.numel(), device=t.device).view(t.shape)
            )
            for t in operands
        }
    args, kwargs = substitute(call.arguments, numbers)
    samples = {id(numbers[key]): layout for key, layout in call.samples.items()}
    return Call(call.func, args, kwargs, samples, call.batch, call.outputs)


def _tried(call: Call) -> tuple[list[Where], Dependence]:
    """Return the same by one of the ways that look at values."""
    for way in _WAYS:
        try:
            return way(call), _dependence(call, way)
        except Unknown:
            pass
    return [NO_TRACE for _ in call.shapes()], "samples"


def _dependence(call: Call, way: Callable[[Call], list[Where]]) -> Dependence:
    """Return what the answer of this way depends on."""
    deciding = _WAYS[way](call)
    constants = [t for t in deciding if id(t) not in call.samples]
    if way is by_trial:
        by_samples = call.func in op_table.VALUES_MATTER
    else:
        by_samples = len(constants) < len(deciding)
    too_many = sum(t.numel() for t in constants) > _MOST_VALUES
    if by_samples or too_many or any(t.layout is not torch.strided for t in constants):
        return "samples"
    return "constants" if constants else "shapes"


def _indices(call: Call) -> list[Tensor]:
    return tensors_in(op_table.index_arguments(call.func, call.args, call.kwargs))


def _masks(call: Call) -> list[Tensor]:
    return [t for t in tensors_in(call.arguments) if is_mask(t)]


def _numbers(call: Call) -> list[Tensor]:
    return [t for t in tensors_in(call.arguments) if may_decide(call, t)]


#: The ways that look at values, the quickest first, and the operands whose values may decide where entries go.
_WAYS: Mapping[Callable[[Call], list[Where]], Callable[[Call], list[Tensor]]] = {
    unobserved: _numbers,
    read_by_index: _masks,
    written_by_index: _indices,
    by_labels: _indices,
    by_sums: _numbers,
    by_trial: _numbers,
}
