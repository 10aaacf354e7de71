"""The mini-batches of a loader as inputs and targets, with a progress bar."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import Dataset, IterableDataset

from persample.errors import BatchError, MissingPackageError

_TARGETS = ("labels", "label", "targets", "target")


def batches_of(loader: Iterable[Any], *, progress: bool = False) -> Iterator[tuple[Any, Any]]:
    """Yield inputs and targets of each mini-batch.

    Args:
        loader: a DataLoader, or any iterable of batches. A batch is a pair of inputs and targets, or a dict in which
            the targets are called "labels" or "targets" (or "label", "target"); its other entries are the inputs.
        progress: whether to show a bar, by tqdm.

    Raises:
        BatchError: a batch is neither; or `loader` is a data set, whose entries are single samples.
        MissingPackageError: `progress` without the package tqdm.
    """
    given: object = loader
    if isinstance(given, Dataset) and not isinstance(given, IterableDataset):
        raise BatchError(
            f"The loader is a {type(given).__name__}, whose entries are single samples: pass "
            "DataLoader(dataset, batch_size=...), with batch_size=None if its entries are batches."
        )
    for batch in _with_bar(loader) if progress else loader:
        yield inputs_and_targets(batch)


def inputs_and_targets(batch: Any) -> tuple[Any, Any]:
    """Return the inputs and the targets of a batch, see `batches_of`.

    Raises:
        BatchError: it is neither a pair nor a dict with targets.
    """
    if isinstance(batch, Mapping):
        names = [name for name in _TARGETS if name in batch]
        if len(names) == 1:
            return {name: value for name, value in batch.items() if name != names[0]}, batch[names[0]]
        raise BatchError(
            f"A batch of the loader is a dict with the entries {', '.join(map(repr, batch))}, of which exactly one "
            f"must be called {' or '.join(map(repr, _TARGETS))}: let the loader yield pairs (inputs, targets)."
        )
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    raise _no_pair(batch)


def _no_pair(batch: Any) -> BatchError:
    return BatchError(
        f"A batch of the loader is of type {type(batch).__name__}"
        f"{f' with {len(batch)} entries' if isinstance(batch, tuple | list) else ''}: let the loader yield pairs "
        "(inputs, targets), with several inputs in a tuple or a dict."
    )


def put_together(
    pairs: Iterable[tuple[Any, Any]], *, samples: int = 512, max_bytes: int = 2**23
) -> Iterator[tuple[Any, Any]]:
    """Yield the same samples in fewer batches, which take less time where a model is small.

    Only batches of which all tensors have the samples in dim 0, and that differ in nothing but their number.

    Args:
        pairs: inputs and targets of each batch.
        samples: how many a batch that was put together has at most,
        max_bytes: and how many bytes its tensors have.
    """
    waiting: list[tuple[Any, Any]] = []
    size, kind = 0, None
    for pair in pairs:
        number, bytes_each, new_kind = _kind_of(pair)
        most = min(samples, max_bytes // bytes_each) if new_kind else -1  # nothing comes beside it
        if waiting and (new_kind != kind or size + number > most):
            yield _joined(waiting)
            waiting, size = [], 0
        waiting.append(pair)
        size, kind = size + number, new_kind
        if size + number > most:  # another one like this would not fit
            yield _joined(waiting)
            waiting, size = [], 0
    if waiting:
        yield _joined(waiting)


def _kind_of(pair: tuple[Any, Any]) -> tuple[int, int, Any]:
    """The number of samples, the bytes of each, and what batches that belong together have in common."""
    leaves, structure = tree_flatten(pair)
    sizes = {len(leaf) if type(leaf) is Tensor and leaf.dim() > 0 else 0 for leaf in leaves}
    number = sizes.pop() if len(sizes) == 1 else 0
    if number == 0 or any(leaf.layout is not torch.strided for leaf in leaves):
        return 0, 0, None
    kind = structure, [(leaf.shape[1:], leaf.dtype, leaf.device) for leaf in leaves]
    return number, max(1, sum(leaf.nbytes for leaf in leaves) // number), kind


def _joined(pairs: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    if len(pairs) == 1:
        return pairs[0]
    flat = [tree_flatten(pair) for pair in pairs]
    leaves = [torch.cat(parts) for parts in zip(*(leaves for leaves, _ in flat), strict=True)]
    joined: tuple[Any, Any] = tree_unflatten(leaves, flat[0][1])
    return joined


def inputs_of(loader: Iterable[Any], *, progress: bool = False) -> Iterator[Any]:
    """Yield the inputs of each mini-batch: as `batches_of`, but a batch without targets is all inputs.

    A batch of a `TensorDataset` of inputs alone is a list of one tensor, which is the inputs.

    Args:
        loader: as for `batches_of`.
        progress: whether to show a bar, by tqdm.

    Raises:
        BatchError: a batch is a list of more than inputs and targets.
        MissingPackageError: `progress` without the package tqdm.
    """
    for batch in _with_bar(loader) if progress else loader:
        if isinstance(batch, Mapping):
            yield {name: value for name, value in batch.items() if name not in _TARGETS}
        elif isinstance(batch, tuple | list) and len(batch) in (1, 2):
            yield batch[0]
        elif isinstance(batch, list):
            raise _no_pair(batch)
        else:
            yield batch


def _with_bar(loader: Iterable[Any]) -> Iterable[Any]:
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingPackageError(f"progress=True needs tqdm ({error}); run: pip install tqdm") from error
    bar: Iterable[Any] = tqdm(loader)
    return bar
