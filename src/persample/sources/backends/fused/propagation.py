"""Where the samples are after an operation that uses no parameter.

Four ways, the quickest first: what is known of the operation by its name and of where each dimension goes
(`op_table`); whose the indices are, if constants are looked up; the same operation on labels, if it only moves entries;
or a trial (`nan_probe`). What is found is remembered for the same operation on the same shapes; where it depends on the
values of constants (indices, masks, lengths), for these values; and not at all where it depends on those of samples.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from persample.sources.backends.fused import op_table
from persample.sources.backends.fused.arguments import substitute, tensors_in
from persample.sources.backends.fused.axis import Axis
from persample.sources.backends.fused.indexing import Lookup, is_mask, lookup_of, written_of
from persample.sources.backends.fused.layout import Layout, Write, of_rows, rows_in, without_gaps
from persample.sources.backends.fused.nan_probe import (
    ALL,
    SEVERAL,
    Arguments,
    marked,
    moved,
    on_copies,
    touched,
    unmarked,
)
from persample.sources.backends.fused.owners import NOBODY, Owners


class Lost(NamedTuple):
    """The tensor depends on the batch, but the position of the samples in it is unknown.

    Attributes:
        reason: why, for the error message.
        mixed: whether samples met there, rather than that a single number was made from all of them (a maximum, which
            is subtracted from everything), or no trace was left.
        pending: where the samples are, if all that is missing is to whom some rows belong that parameters and constants
            made: that is known once they meet those of a sample.
        picked: whether they met because rows had been picked, so that one sample's met those of another.
    """

    reason: str
    mixed: bool = False
    pending: Layout | None = None
    picked: bool = False


Where = Layout | Lost | None
"""Where the samples are in a tensor; None if it holds none."""

_NO_TRACE = Lost("its results do not show what they depend on")

Dependence = Literal["shapes", "constants", "samples"]
"""What an answer depends on besides the operation: shapes and layouts alone, or also the values of these tensors."""

_found: dict[Hashable, list[Where]] = {}
_by_constants: set[Hashable] = set()  # the keys of calls whose answers depend on the values of constants, too
_MOST_FOUND = 10_000
_MOST_VALUES = 2**20


class Unknown(Exception):  # noqa: N818 - no error, but the answer of one way, and the next is tried
    """This method cannot answer the question; try the next one."""


class Call(NamedTuple):
    """An operation.

    Attributes:
        func: the operation.
        args: its positional arguments.
        kwargs: its keyword arguments.
        samples: the layouts of its operands that hold samples, by their id.
        batch: B.
        outputs: what it returned or wrote into; None if it has not run yet.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    samples: Mapping[int, Layout]
    batch: int
    outputs: list[Tensor] | None = None

    @property
    def name(self) -> str:
        """The operation's name, for errors."""
        return getattr(self.func, "__name__", str(self.func))

    def operands(self) -> list[Tensor]:
        """The operands that hold samples."""
        return [t for t in tensors_in((self.args, dict(self.kwargs))) if id(t) in self.samples]

    def run(self, arguments: Arguments) -> list[Tensor]:
        """Run it on other arguments."""
        args, kwargs = arguments
        return outputs_of(self.func, args, self.func(*args, **kwargs))

    def shapes(self) -> list[torch.Size]:
        """The shapes of the outputs."""
        outputs = self.outputs if self.outputs is not None else on_copies(self.run, (self.args, dict(self.kwargs)))
        return [output.shape for output in outputs]


def after(call: Call) -> list[Where]:
    """Return where the samples are in the outputs of `call`, of which at least one operand has a layout."""
    shapes = _key(call)
    key = (shapes, _values(call)) if shapes in _by_constants else shapes
    found = _found.get(key)
    if found is None:
        found, dependence = _find(call)
        if shapes is not None and dependence != "samples":
            if len(_found) >= _MOST_FOUND:
                _found.clear()
            if dependence == "constants":
                _by_constants.add(shapes)
                key = (shapes, _values(call))
            _found[key] = found
    return found


def without_owner(layout: Layout) -> Lost:
    """Return the layout of a result computed from parameters and rows of which some have no owner."""
    return Lost(
        "some rows come from parameters alone and were combined with rows of no sample", mixed=True, pending=layout
    )


def bound(call: Call, pending: Mapping[int, Layout | None]) -> list[Where]:
    """Return the layout after `call`, in which rows without an owner may be combined with those of samples.

    Args:
        call: the operation.
        pending: the layouts of operands of which some rows have no owner yet, by their id; None for what is lost.

    Raises:
        Unknown: it does not tell who the owners are.
    """
    operands = [t for t in tensors_in((call.args, dict(call.kwargs))) if id(t) in pending]
    waits = {key: layout for key, layout in pending.items() if layout is not None}
    first = waits[id(operands[0])] if len(waits) == len(pending) else None
    if first is None or first.owners is None or any(each.owners is not first.owners for each in waits.values()):
        raise Unknown
    if not call.samples:
        if call.func in _PARTS and len(operands) == 1 and first.outer == 1:
            size, shapes = len(operands[0]), call.shapes()
            if first.rows == size and all(shape[:1] == (size,) for shape in shapes):  # the rows stay whole
                return [without_owner(first._replace(inner=math.prod(shape[1:]))) for shape in shapes]
        raise Unknown
    if call.func not in op_table.SHAPE_KEEPING:
        raise Unknown
    (shape,) = call.shapes()
    layout = agreed(call.samples, call.operands(), shape, aligned)
    waiting = agreed(waits, operands, shape, aligned)
    if layout._replace(owners=None) != waiting._replace(owners=None) or layout.rows != waiting.rows:
        raise Unknown
    labels, known = layout.row_labels(first.owners.labels.device), first.owners.labels
    if not bool(((known == labels) | (known == NOBODY)).all()) or bool((labels == NOBODY).any()):
        raise Unknown
    first.owners.bind(labels)
    return [layout]


_PARTS = op_table.functions("chunk split split_with_sizes unsafe_chunk unsafe_split narrow")


def outputs_of(func: Any, args: tuple[Any, ...], result: Any) -> list[Tensor]:
    """Return the tensors that an operation returned or wrote to."""
    return [args[0]] if func is Tensor.__setitem__ else tensors_in(result)


def _find(call: Call) -> tuple[list[Where], Dependence]:
    """Return where the samples are in the outputs, and what that depends on."""
    try:
        return _by_family(call), "shapes"
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
    operands = tensors_in((call.args, dict(call.kwargs)))
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
    args, kwargs = substitute((call.args, dict(call.kwargs)), numbers)
    samples = {id(numbers[key]): layout for key, layout in call.samples.items()}
    return Call(call.func, args, kwargs, samples, call.batch, call.outputs)


def _tried(call: Call) -> tuple[list[Where], Dependence]:
    """Return the same by one of the ways that look at values."""
    for way in (_unobserved, _by_indices, _by_places, _by_labels, _by_sums, _by_nan):
        try:
            return way(call), _dependence(call, way)
        except Unknown:
            pass
    return [_NO_TRACE for _ in call.shapes()], "samples"


def _dependence(call: Call, way: Callable[[Call], list[Where]]) -> Dependence:
    """Return what the answer of this method depends on."""
    deciding = _deciding(call, way)
    constants = [t for t in deciding if id(t) not in call.samples]
    if way is _by_nan:
        by_samples = call.func in op_table.VALUES_MATTER
    else:
        by_samples = len(constants) < len(deciding)
    too_many = sum(t.numel() for t in constants) > _MOST_VALUES
    if by_samples or too_many or any(t.layout is not torch.strided for t in constants):
        return "samples"
    return "constants" if constants else "shapes"


def _deciding(call: Call, way: Callable[[Call], list[Where]]) -> list[Tensor]:
    """Return the operands whose values may decide where entries go."""
    operands = tensors_in((call.args, dict(call.kwargs)))
    if way in (_by_labels, _by_places):
        return tensors_in(op_table.index_arguments(call.func, call.args, call.kwargs))
    return [t for t in operands if (is_mask(t) if way is _by_indices else _may_decide(call, t))]


def _may_decide(call: Call, tensor: Tensor) -> bool:
    """Whether a tensor holds integers (a mask, positions), or has entries that are left out."""
    real = tensor.is_floating_point() or tensor.is_complex()
    return not real or tensor.layout is not torch.strided or call.func in op_table.POSITIONS


# By family.


def _by_family(call: Call) -> list[Where]:
    func, operands = call.func, call.operands()
    owner = _only_owner(call)
    into_constants = func in op_table.INTO and id(call.args[0] if call.args else None) not in call.samples
    of_all = func not in op_table.MOVES and not into_constants and any(func in kind for kind in _OF_ALL_ENTRIES)
    if owner is not None and of_all:
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
            return [_of_all(call, shape) for shape in call.shapes()]
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


def _unobserved(call: Call) -> list[Where]:
    """Values are rounded to a grid entry by entry; the grid itself must not depend on the samples."""
    observes = call.args[1] if len(call.args) > 1 else call.kwargs.get("observer_on")
    if call.func not in op_table.OBSERVING or observes is None or bool(observes.any()):
        raise Unknown
    return _agreed(call, call.operands(), aligned)


# By indices, by labels, and by trial.

_BY_MEMORY = op_table.functions("as_strided")
_BETWEEN_ENTRIES = Lost("as_strided may read memory outside the tensor: call .contiguous() first", mixed=True)


def _by_indices(call: Call) -> list[Where]:
    """Constants are looked up by indices of samples: an entry of the result belongs to the owner of its index."""
    lookup = _read(lookup_of, call)
    if id(call.args[0]) in call.samples:
        raise Unknown
    owner = _owner_of_numbers(call, lookup.tensors.values())
    (shape,) = call.shapes()
    behind = len(shape) - lookup.before - owner.dim()
    return [_where(call, owner.view([1] * lookup.before + list(owner.shape) + [1] * behind).expand(shape))]


def _by_places(call: Call) -> list[Where]:
    """Constants are written at indices of samples: an entry belongs to the owner of its index."""
    lookup = _read(written_of, call)
    index = op_table.index_arguments(call.func, call.args, call.kwargs)[0]
    content = {id(t) for t in call.operands()} - {id(t) for t in tensors_in(index)}
    if content:
        raise Unknown
    numbers = list(lookup.tensors.values())
    if len(numbers) == 1 and is_mask(numbers[0]):  # what it hides belongs to its samples, too
        shown = torch.ones_like(numbers[0])
        owner = call.samples[id(numbers[0])].labels(shown.shape, shown.device).reshape(-1)
        index = substitute(index, {id(numbers[0]): shown})
    else:
        owner = _owner_of_numbers(call, numbers)
    labels = torch.full(call.args[0].shape, NOBODY, device=owner.device)
    behind = labels[index].dim() - lookup.before - owner.dim()
    labels[index] = owner.view(list(owner.shape) + [1] * behind)
    return [_where(call, labels, nobody=None)]


def _read(reading: Callable[..., Lookup | None], call: Call) -> Lookup:
    try:
        lookup = reading(call.func, call.args, call.kwargs)
    except (RuntimeError, ValueError, TypeError) as error:
        raise Unknown from error
    if lookup is None:
        raise Unknown
    return lookup


def _owner_of_numbers(call: Call, numbers: Iterable[Tensor]) -> Tensor:
    """Return the owners of the index tensors and masks, broadcast against each other.

    Raises:
        Unknown: none is of a sample.
    """
    owners = []
    for given in numbers:
        layout = call.samples.get(id(given))
        if layout is None:
            owner = torch.full((), NOBODY, device=given.device).expand(given.shape)
        else:
            owner = layout.labels(given.shape, given.device)
        owners.append(owner[given.bool()] if is_mask(given) else owner)
    if all(id(given) not in call.samples for given in numbers):
        raise Unknown
    owner, *others = torch.broadcast_tensors(*owners)
    for other in others:
        owner = torch.where((owner == NOBODY) | (owner == other), other, torch.where(other == NOBODY, owner, SEVERAL))
    return owner


def _by_labels(call: Call) -> list[Where]:
    if call.func not in op_table.MOVES or _adds(call):
        raise Unknown
    indices = {id(t) for t in tensors_in(op_table.index_arguments(call.func, call.args, call.kwargs))}
    labels = _labels(call, marked, leave=indices)
    if not labels:
        raise Unknown
    if op_table.is_in_place(call.func):
        labels = {key: label.clone(memory_format=torch.contiguous_format) for key, label in labels.items()}
    try:
        with torch.no_grad():
            results = moved(call.run, (call.args, dict(call.kwargs)), labels, indices)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise Unknown from error
    return [_where(call, result, lambda rows: unmarked(rows, call.batch), nobody=None) for result in results]


def _adds(call: Call) -> bool:
    """Whether entries are accumulated, not overwritten."""
    return bool(call.kwargs.get("accumulate", call.kwargs.get("reduce"))) or any(item is True for item in call.args[3:])


def _by_sums(call: Call) -> list[Where]:
    """Entries are accumulated at constant indices: a sum belongs to the common owner of its terms."""
    if call.func not in op_table.ADDITIONS or len(call.args) + len(call.kwargs.keys() & _ADDED) != 4:
        raise Unknown
    target, dim, index, added = (*call.args, *(call.kwargs[name] for name in _ADDED if name in call.kwargs))
    if id(index) in call.samples or target.dim() == 0 or added.dim() != target.dim():
        raise Unknown
    device, dim = target.device, dim % target.dim()
    if id(target) in call.samples:
        owner, others = (_along_dim(call, t, dim) for t in (target, added))
        match [_along_dim(call, t, dim) for t in (target, added)]:
            case [Tensor() as owner, Tensor() as others] if _are_owners(owner[index.reshape(-1)], others):
                return [call.samples[id(target)]]
    nobody = torch.full((), NOBODY, device=device)
    labels = [
        call.samples[id(t)].labels(t.shape, device) if id(t) in call.samples else nobody.expand(t.shape)
        for t in (target, added)
    ]
    for d in range(target.dim()):
        if d != dim and all(label.stride(d) == 0 for label in labels):  # the same for all entries along it
            labels = [label.narrow(d, 0, min(1, label.shape[d])) for label in labels]
    if id(target) in call.samples:
        owner, others = torch.broadcast_tensors(labels[0].index_select(dim, index.reshape(-1)), labels[1])
        if _are_owners(owner, others):  # the rule: it belongs to whom it did
            return [call.samples[id(target)]]
    first, last = (
        _reduced(labels[0], dim, index, labels[1], reduction, others)
        for reduction, others in (("amin", call.batch), ("amax", NOBODY))
    )
    owner = torch.where((first == last) | (last == NOBODY), last, SEVERAL)
    return [_where(call, owner.expand(target.shape), likely=[dim])]


def _along_dim(call: Call, tensor: Tensor, dim: int) -> Tensor | None:
    """Return the owners along one dimension of `tensor`, if they are the same along all others."""
    layout = call.samples.get(id(tensor))
    axis = None if layout is None else layout.axis(tensor.shape)
    if layout is None or axis is None or axis.dim != dim:
        return None
    rows = layout.row_labels(tensor.device)
    return rows if axis.folded == 1 else rows.view(1, -1, 1).expand(axis.before, -1, axis.after).reshape(-1)


def _are_owners(owner: Tensor, others: Tensor) -> bool:
    return torch.equal(owner, others) or bool((others == owner).logical_or(others == NOBODY).all())


_ADDED = ("input", "dim", "index", "source")


def _reduced(labels: Tensor, dim: int, index: Tensor, added: Tensor, reduction: str, nobody: int) -> Tensor:
    """Return the smallest or largest label among the terms of each sum, with `nobody` for unowned terms."""
    known, others = (torch.where(t == NOBODY, nobody, t) for t in (labels, added))
    places = index.reshape([-1 if d == dim else 1 for d in range(labels.dim())]).expand(others.shape)
    return known.scatter_reduce(dim, places.long(), others, reduction)


def _by_nan(call: Call) -> list[Where]:
    if call.func in _BY_MEMORY and any(torch.empty_like(t).stride() != t.stride() for t in call.operands()):
        return [_BETWEEN_ENTRIES for _ in call.shapes()]
    try:
        owners = touched(call.run, (call.args, dict(call.kwargs)), _labels(call), call.batch)
    except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError) as error:
        if call.func in _BY_MEMORY:
            return [_BETWEEN_ENTRIES for _ in call.shapes()]
        raise Unknown from error
    # Indices that come with values (topk, max) belong to the samples of the values.
    by_shape = {owner.shape: owner for owner in owners if owner is not None}
    return [_where(call, by_shape[shape]) if shape in by_shape else _NO_TRACE for shape in call.shapes()]


def _labels(call: Call, write: Write = lambda rows: rows, leave: Collection[int] = ()) -> dict[int, Tensor]:
    return {id(t): call.samples[id(t)].labels(t.shape, t.device, write) for t in call.operands() if id(t) not in leave}


def _of_all(call: Call, shape: torch.Size) -> Lost:
    return Lost(f"{call.name} computes an entry of its result from all of them", mixed=shape.numel() > 1)


def _where(
    call: Call,
    labels: Tensor,
    read: Write = lambda rows: rows,
    nobody: Where = _NO_TRACE,
    likely: Sequence[int] = (),
) -> Where:
    if labels.numel() == 0:
        return Layout(1, call.batch, 0)
    outer, rows, inner = rows_in(labels)
    rows = read(rows)
    picked = any(layout.owners is not None for layout in call.samples.values())
    if bool((rows == SEVERAL).any()) or (bool((rows == ALL).any()) and (picked or len(call.operands()) > 1)):
        return Lost(f"{call.name} computes an entry of its result from several of them", mixed=True, picked=picked)
    if bool((rows == ALL).any()):
        return _of_all(call, labels.shape)
    if not bool((rows != NOBODY).any()):
        return nobody
    if bool((rows == NOBODY).any()):
        outer, rows, inner = rows_in(without_gaps(read(labels), likely or [axis.dim for axis in _axes(call)]))
    return of_rows(outer, rows, inner, call.batch)


def _axes(call: Call) -> Iterable[Axis]:
    """Where the operands hold samples, if each is in one dimension."""
    axes = (call.samples[id(operand)].axis(operand.shape) for operand in call.operands())
    return (axis for axis in axes if axis is not None)


# Remembering.


def _key(call: Call) -> Hashable | None:
    """What the answer depends on, other than values of tensors; None if owners of single rows matter."""
    if any(layout.owners is not None for layout in call.samples.values()):
        return None
    key: list[Any] = [call.func, call.batch, call.outputs and tuple([output.shape for output in call.outputs])]
    try:
        _describe(call.args, call.samples, key)
        if call.kwargs:
            key += call.kwargs
            _describe(call.kwargs.values(), call.samples, key)
        found = tuple(key)
        hash(found)
    except (Unknown, TypeError):  # something cannot be hashed
        return None
    return found


def _describe(items: Iterable[Any], samples: Mapping[int, Layout], key: list[Any]) -> None:
    """Append a description of `items` to `key`; counts encode the nesting."""
    for item in items:
        if isinstance(item, Tensor):
            key += (item.shape, item.dtype, item.device, samples.get(id(item)))
            if item.numel() == 1 and _is_number(item) and id(item) not in samples:
                key.append(item.item())  # PyTorch takes it for a number, such as the width of a padding
        elif isinstance(item, _SEQUENCES):
            key += (_SEQUENCES, len(item))
            _describe(item, samples, key)
        elif isinstance(item, dict):
            key += (dict, len(item), *item)
            _describe(item.values(), samples, key)
        elif isinstance(item, slice):
            ends = (item.start, item.stop, item.step)
            if any(isinstance(end, Tensor) for end in ends):
                raise Unknown
            key += (slice, *ends)
        else:
            key += (type(item), item)


def _is_number(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not (tensor.is_floating_point() or tensor.is_complex())


def _values(call: Call) -> bytes:
    """Return a fingerprint of the values of constants that may decide where entries go."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors_in((call.args, dict(call.kwargs))):
        if id(tensor) not in call.samples and _may_decide(call, tensor):
            found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.digest()


_SEQUENCES = (tuple, list)
