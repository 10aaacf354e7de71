"""Where the samples are after an operation that uses no parameter.

Four ways, the quickest first: what is known of the operation by its name and of where each dimension goes
(`families`); whose the indices are, if constants are looked up; the same operation on labels, if it only moves entries;
or a trial (`trial`). What is found is remembered for the same operation on the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from persample.sources.fused import families
from persample.sources.fused.arguments import tensors_in
from persample.sources.fused.layout import Layout, Write, of_rows, rows_in, without_gaps
from persample.sources.fused.owners import NOBODY
from persample.sources.fused.places import Place
from persample.sources.fused.trial import ALL, SEVERAL, Arguments, marked, moved, on_copies, touched, unmarked


class Lost(NamedTuple):
    """Nobody can tell where the samples are in a tensor that depends on the batch.

    Attributes:
        reason: why, for the error message.
        mixed: whether samples met there, rather than that a single number was made from all of them (a maximum, which
            is subtracted from everything), or no trace was left.
    """

    reason: str
    mixed: bool = False


Where = Layout | Lost | None
"""Where the samples are in a tensor; None if it holds none."""

_NO_TRACE = Lost("its results do not show what they depend on")

_found: dict[Hashable, list[Where]] = {}
_MOST_FOUND = 10_000


class Unknown(Exception):  # noqa: N818 - no error, but the answer of one way, and the next is tried
    """This way does not lead to the answer."""


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
    key = _key(call)
    found = _found.get(key) if key is not None else None
    if found is None:
        found, by_values = _find(call)
        if key is not None and not by_values:
            if len(_found) >= _MOST_FOUND:
                _found.clear()
            _found[key] = found
    return found


def outputs_of(func: Any, args: tuple[Any, ...], result: Any) -> list[Tensor]:
    """Return the tensors that an operation returned or wrote into."""
    return [args[0]] if func is Tensor.__setitem__ else tensors_in(result)


def _find(call: Call) -> tuple[list[Where], bool]:
    """Return where the samples are in the outputs, and whether that depends on values, not on shapes alone."""
    try:
        return _by_family(call), False
    except Unknown:
        pass
    try:
        return _by_indices(call), False
    except Unknown:
        pass
    try:
        return _by_labels(call)
    except Unknown:
        pass
    try:
        return _by_nan(call), call.func in families.VALUES_MATTER
    except Unknown:
        return [_NO_TRACE for _ in call.shapes()], True


# By family.


def _by_family(call: Call) -> list[Where]:
    func, operands = call.func, call.operands()
    if func in families.POINTWISE or func in families.COMPARISONS:
        return _agreed(call, operands, aligned)
    if func in families.PRODUCTS:
        return _agreed(call, operands, _before_the_last_two)
    if func in families.JOINING:
        return _agreed(call, operands, _joined(call))
    first = call.args[0] if call.args else None
    if not isinstance(first, Tensor) or id(first) not in call.samples:
        raise Unknown
    if func in families.LEADING and len(operands) == 1:
        return _agreed(call, operands, _leading(call))
    if func in families.ALONG:
        if families.dims_of(func, call.args, call.kwargs) is families.ALL:
            return [_of_all(call, shape) for shape in call.shapes()]
        # Indices of one dimension hold no entry for each sample.
        return _agreed(call, [t for t in operands if t.dim() == first.dim()], _along(call))
    raise Unknown


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
        place = layout.place(operand.shape)
        if place is None:
            raise Unknown
        dim = dim_after(operand, place.dim, len(shape))
        if not 0 <= dim < len(shape) or shape[dim] != operand.shape[place.dim]:
            raise Unknown
        found.add(layout.at(place._replace(dim=dim), shape))
    if len(found) != 1:
        raise Unknown
    return found.pop()


def aligned(operand: Tensor, dim: int, ndim: int) -> int:
    """Operands are broadcast to each other, last dimension to last dimension."""
    return dim + ndim - operand.dim()


def _before_the_last_two(operand: Tensor, dim: int, ndim: int) -> int:
    if dim >= operand.dim() - 2:
        raise Unknown
    return aligned(operand, dim, ndim)


def _leading(call: Call) -> DimAfter:
    trailing = families.LEADING[call.func]
    if isinstance(trailing, str):
        trailing = len(call.kwargs.get(trailing, call.args[1] if len(call.args) > 1 else ()))

    def dim_after(operand: Tensor, dim: int, ndim: int) -> int:
        if dim >= operand.dim() - trailing:
            raise Unknown
        return dim

    return dim_after


def _along(call: Call) -> DimAfter:
    dims = families.dims_of(call.func, call.args, call.kwargs)
    if dims is None:
        raise Unknown

    def dim_after(operand: Tensor, dim: int, ndim: int) -> int:
        acted = {d % operand.dim() for d in dims}
        if dim in acted:
            raise Unknown
        return dim if ndim == operand.dim() else dim - sum(d < dim for d in acted)

    return dim_after


def _joined(call: Call) -> DimAfter:
    new = families.JOINING[call.func]
    joined = call.kwargs.get("dim", call.kwargs.get("axis", call.args[1] if len(call.args) > 1 else 0))

    def dim_after(operand: Tensor, dim: int, ndim: int) -> int:
        if not new and dim == joined % ndim:
            raise Unknown
        return dim + (new and joined % ndim <= dim)

    return dim_after


# By indices, by labels, and by trial.


def _by_indices(call: Call) -> list[Where]:
    """Constants are looked up by the numbers of samples: an entry of the result belongs to whom its index belongs."""
    if not call.args or call.func not in families.MOVES or id(call.args[0]) in call.samples:
        raise Unknown
    first, indices = families.looked_up_by(call.func, call.args, call.kwargs)
    if not any(id(index) in call.samples for index in indices) or any(i.dtype == torch.bool for i in indices):
        raise Unknown
    place = torch.broadcast_shapes(*(index.shape for index in indices))
    owner = torch.full(place, NOBODY, device=indices[0].device)
    for index in indices:
        if id(index) in call.samples:
            own = call.samples[id(index)].labels(index.shape, owner.device).expand(place)
            owner = torch.where((owner == NOBODY) | (owner == own), own, torch.where(own == NOBODY, owner, SEVERAL))
    (shape,) = call.shapes()
    behind = len(shape) - first - len(place)
    return [_where(call, owner.view([1] * first + list(place) + [1] * behind).expand(shape))]


def _by_labels(call: Call) -> tuple[list[Where], bool]:
    if call.func not in families.MOVES:
        raise Unknown
    indices = {id(t) for t in tensors_in(families.index_arguments(call.func, call.args, call.kwargs))}
    labels = _labels(call, marked, leave=indices)
    if not labels:
        raise Unknown
    if families.is_in_place(call.func):
        labels = {key: label.clone(memory_format=torch.contiguous_format) for key, label in labels.items()}
    try:
        with torch.no_grad():
            results = moved(call.run, (call.args, dict(call.kwargs)), labels, indices)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise Unknown from error
    where = [_where(call, result, lambda rows: unmarked(rows, call.batch), nobody=None) for result in results]
    operands = tensors_in((call.args, dict(call.kwargs)))
    return where, any(not t.is_floating_point() and id(t) not in labels for t in operands)


def _by_nan(call: Call) -> list[Where]:
    try:
        owners = touched(call.run, (call.args, dict(call.kwargs)), _labels(call), call.batch)
    except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError) as error:
        raise Unknown from error
    # Indices that come with values (topk, max) belong to the samples of the values.
    by_shape = {owner.shape: owner for owner in owners if owner is not None}
    return [_where(call, by_shape[shape]) if shape in by_shape else _NO_TRACE for shape in call.shapes()]


def _labels(call: Call, write: Write = lambda rows: rows, leave: Collection[int] = ()) -> dict[int, Tensor]:
    return {id(t): call.samples[id(t)].labels(t.shape, t.device, write) for t in call.operands() if id(t) not in leave}


def _of_all(call: Call, shape: torch.Size) -> Lost:
    return Lost(f"{call.name} makes an entry of its result from all of them", mixed=shape.numel() > 1)


def _where(call: Call, labels: Tensor, read: Write = lambda rows: rows, nobody: Where = _NO_TRACE) -> Where:
    if labels.numel() == 0:
        return Layout(1, call.batch, 0)
    outer, rows, inner = rows_in(labels)
    rows = read(rows)
    picked = any(layout.owners is not None for layout in call.samples.values())
    if bool((rows == SEVERAL).any()) or (bool((rows == ALL).any()) and (picked or len(call.operands()) > 1)):
        return Lost(f"{call.name} makes an entry of its result from several of them", mixed=True)
    if bool((rows == ALL).any()):
        return _of_all(call, labels.shape)
    if not bool((rows != NOBODY).any()):
        return nobody
    if bool((rows == NOBODY).any()):
        outer, rows, inner = rows_in(without_gaps(read(labels), [place.dim for place in _places(call)]))
    return of_rows(outer, rows, inner, call.batch)


def _places(call: Call) -> Iterable[Place]:
    """Where the operands hold samples, if each is in one dimension."""
    places = (call.samples[id(operand)].place(operand.shape) for operand in call.operands())
    return (place for place in places if place is not None)


# Remembering.


def _key(call: Call) -> Hashable | None:
    """What the answer depends on, but for values; None where whose single rows are matters."""
    if any(layout.owners is not None for layout in call.samples.values()):
        return None
    key: list[Any] = [call.func, call.batch]
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
    """Append what is to be known of `items` to `key`; the numbers of items say how they are nested."""
    for item in items:
        if isinstance(item, Tensor):
            key += (item.shape, item.dtype, samples.get(id(item)))
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


_SEQUENCES = (tuple, list)
