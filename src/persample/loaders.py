"""The mini-batches of a loader as inputs and targets, with a progress bar."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from persample.errors import BatchError, MissingPackageError

_TARGETS = ("labels", "label", "targets", "target")


def batches_of(loader: Iterable[Any], *, progress: bool = False) -> Iterator[tuple[Any, Any]]:
    """Yield inputs and targets of each mini-batch.

    Args:
        loader: a DataLoader, or any iterable of batches. A batch is a pair of inputs and targets, or a dict in which
            the targets are called "labels" or "targets" (or "label", "target"); its other entries are the inputs.
        progress: whether to show a bar, by tqdm.

    Raises:
        BatchError: a batch is neither.
        MissingPackageError: `progress` without the package tqdm.
    """
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
    raise BatchError(
        f"A batch of the loader is of type {type(batch).__name__}"
        f"{f' with {len(batch)} entries' if isinstance(batch, tuple | list) else ''}: let the loader yield pairs "
        "(inputs, targets), with several inputs in a tuple or a dict."
    )


def inputs_of(loader: Iterable[Any], *, progress: bool = False) -> Iterator[Any]:
    """Yield the inputs of each mini-batch: as `batches_of`, but a batch without targets is all inputs.

    A batch of a `TensorDataset` of inputs alone is a list of one tensor, which is the inputs.

    Args:
        loader: as for `batches_of`.
        progress: whether to show a bar, by tqdm.
    """
    for batch in _with_bar(loader) if progress else loader:
        if isinstance(batch, Mapping):
            yield {name: value for name, value in batch.items() if name not in _TARGETS}
        elif isinstance(batch, tuple | list) and len(batch) in (1, 2):
            yield batch[0]
        else:
            yield batch


def _with_bar(loader: Iterable[Any]) -> Iterable[Any]:
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingPackageError(f"progress=True needs tqdm ({error}); run: pip install tqdm") from error
    bar: Iterable[Any] = tqdm(loader)
    return bar
