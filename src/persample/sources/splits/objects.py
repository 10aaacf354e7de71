"""Objects that hold tensors."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from itertools import islice
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from persample.sources.splits.tree import Split


def fields_of(leaf: Any) -> dict[str, Any] | None:
    """Return the fields of a dataclass or of a mapping other than dict, by name; None for any other leaf."""
    if isinstance(leaf, MutableMapping):
        return dict(leaf)
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type | Split):
        names = [field.name for field in dataclasses.fields(leaf)]
        return {name: getattr(leaf, name) for name in names if hasattr(leaf, name)}
    return None


def with_fields(original: Any, fields: Mapping[str, Any]) -> Any:
    """Return a copy of the object with other fields; inverse of `fields_of`."""
    twin = copy.copy(original)
    for name, value in fields.items():
        if isinstance(twin, MutableMapping):
            twin[name] = value
        else:
            object.__setattr__(twin, name, value)  # also where the dataclass is frozen
    return twin


def is_array(leaf: Any) -> bool:
    """Whether an object is an array of NumPy, which need not be installed."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(leaf, numpy.ndarray)


_MOST = 1000  # objects may be large, and hold each other in circles


def holds_tensors(leaf: Any) -> bool:
    """Whether any object holds a tensor."""
    return any(True for _ in tensors_held(leaf))


def tensors_held(leaf: Any) -> Iterator[Tensor]:
    """Yield the tensors that an object holds in its attributes, recursively; modules are skipped."""
    pending = deque([leaf])
    for _ in range(_MOST):
        if not pending:
            break
        found = pending.popleft()
        if isinstance(found, Tensor):
            yield found
        pending.extend(islice(_held(found), _MOST))


def _held(leaf: Any) -> Iterable[Any]:
    if isinstance(leaf, type | ModuleType | nn.Module | Tensor | str | bytes):
        return ()
    if isinstance(leaf, Mapping):
        return leaf.values()
    if isinstance(leaf, list | tuple | set | frozenset):
        return leaf
    return getattr(leaf, "__dict__", {}).values()
