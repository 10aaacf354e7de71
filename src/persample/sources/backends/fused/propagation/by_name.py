"""What is known of an operation by its name, and of where each dimension of its operands goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from persample.sources.backends.fused import op_table
from persample.sources.backends.fused.layout import Layout
from persample.sources.backends.fused.owners import Owners
from persample.sources.backends.fused.propagation.call import Call, Unknown
from persample.sources.backends.fused.propagation.labels import of_all
from persample.sources.backends.fused.propagation.lost import Where


def by_name(call: Call) -> list[Where]:
    """Return the same by the family of operations to which it belongs."""
    func, operands = call.func, call.operands()
    owner = _only_owner(call)
    into_constants = func in op_table.INTO and id(call.args[0] if call.args else None) not in call.samples
    owned = func not in op_table.MOVES and not into_constants and any(func in kind for kind in _OF_ALL_ENTRIES)
    if owner is not None and owned:
        return [Layout(1, call.batch, shape.numel(), owner) for shape in call.shapes()]
    if func in op_table.POINTWISE or func in op_table.COMPARISONS:
        return _agreed(call, operands, aligned)
    if func in op_table.PRODUCTS:
        return _agreed(call, operands, _before_the_last_two)
    if func in op_table.JOINING:
        return _agreed(call, operands, _joined(call))
    if func in op_table.POSITIONS:  # a kernel on GPUs passes NaN over, so that a trial tells nothing
        return _agreed(call, operands, _first_of_each)
    first = call.args[0] if call.args else None
    if not isinstance(first, Tensor) or (id(first) not in call.samples and func not in op_table.BY_INDICES):
        raise Unknown
    if func in op_table.LEADING and len(operands) == 1:
        return _agreed(call, operands, _leading(call))
    if func in op_table.ALONG:
        dims = op_table.dims_of(func, call.args, call.kwargs)
        if dims is op_table.ALL or (func in op_table.REDUCTIONS and dims and _reduced_away(call, first, dims)):
            return [of_all(call, shape) for shape in call.shapes()]
        # Indices of one dimension hold no entry for each sample.
        return _agreed(call, [t for t in operands if t.dim() == first.dim()], _along(call))
    raise Unknown


def _reduced_away(call: Call, first: Tensor, dims: tuple[int, ...]) -> bool:
    """Whether an operation reduces the dimension of `first` that holds the samples, each once."""
    layout = call.samples[id(first)]
    axis = layout.axis(first.shape) if len(call.samples) == 1 and layout.owners is None else None
    return axis is not None and axis.dim in {d % first.dim() for d in dims}


# What these make of one sample alone belongs to it, each entry.
_OF_ALL_ENTRIES = (op_table.POINTWISE, op_table.COMPARISONS, op_table.PRODUCTS, op_table.LEADING, op_table.ALONG)


def _only_owner(call: Call) -> Owners | None:
    """Return the owner of all operands that hold samples, if that is a single sample."""
    owners = [layout.owners for layout in call.samples.values()]
    first = owners[0]
    if first is None or any(owner is None or not torch.equal(owner.one, first.one) for owner in owners):
        return None
    return first if len(first.one) == 1 else None


DimAfter = Callable[[Tensor, int, int], int]
"""Where dimension d of an operand is in a result of so many dimensions."""


def _agreed(call: Call, operands: list[Tensor], dim_after: DimAfter) -> list[Where]:
    return [agreed(call.samples, operands, shape, dim_after) for shape in call.shapes()]


def agreed(samples: Mapping[int, Layout], operands: list[Tensor], shape: Sequence[int], dim_after: DimAfter) -> Layout:
    """Return the layout of a result of `shape` on which all operands that hold samples agree.

    Raises:
        Unknown: they do not.
    """
    found = set()
    for operand in operands:
        layout = samples[id(operand)]
        axis = layout.axis(operand.shape)
        if axis is None:
            raise Unknown
        dim = dim_after(operand, axis.dim, len(shape))
        if not 0 <= dim < len(shape) or shape[dim] != operand.shape[axis.dim]:
            raise Unknown
        found.add(layout.at(axis._replace(dim=dim), shape))
    if len(found) != 1:
        raise Unknown
    return found.pop()


def aligned(operand: Tensor, dim: int, ndim: int) -> int:
    """Operands are broadcast against each other, aligned at the last dimension."""
    return dim + ndim - operand.dim()


def _before_the_last_two(operand: Tensor, dim: int, ndim: int) -> int:
    if dim >= operand.dim() - 2:
        raise Unknown
    return aligned(operand, dim, ndim)


def _first_of_each(operand: Tensor, dim: int, ndim: int) -> int:
    if dim != 0:
        raise Unknown
    return 0


def _leading(call: Call) -> DimAfter:
    trailing = op_table.LEADING[call.func]
    if isinstance(trailing, str):
        trailing = len(call.kwargs.get(trailing, call.args[1] if len(call.args) > 1 else ()))

    def dim_after(operand: Tensor, dim: int, ndim: int) -> int:
        if dim >= operand.dim() - trailing:
            raise Unknown
        return dim

    return dim_after


def _along(call: Call) -> DimAfter:
    dims = op_table.dims_of(call.func, call.args, call.kwargs)
    if dims is None:
        raise Unknown

    def dim_after(operand: Tensor, dim: int, ndim: int) -> int:
        acted = {d % operand.dim() for d in dims}
        if dim in acted:
            raise Unknown
        return dim if ndim == operand.dim() else dim - sum(d < dim for d in acted)

    return dim_after


def _joined(call: Call) -> DimAfter:
    new = op_table.JOINING[call.func]
    joined = call.kwargs.get("dim", call.kwargs.get("axis", call.args[1] if len(call.args) > 1 else 0))

    def dim_after(operand: Tensor, dim: int, ndim: int) -> int:
        if not new and dim == joined % ndim:
            raise Unknown
        return dim + (new and joined % ndim <= dim)

    return dim_after


def unobserved(call: Call) -> list[Where]:
    """Values are rounded to a grid entry by entry; the grid itself must not depend on the samples."""
    observes = call.args[1] if len(call.args) > 1 else call.kwargs.get("observer_on")
    if call.func not in op_table.OBSERVING or observes is None or bool(observes.any()):
        raise Unknown
    return _agreed(call, call.operands(), aligned)
