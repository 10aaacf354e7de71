"""Choosing among exact forms of the same result: timed once for each kind and size, then remembered.

Sequences and images come in ever new lengths, and no length may cost a trial, or memory that is kept:

- lengths between the same powers of two share a trial;
- a form that is compiled for each shape serves few shapes of a kind.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from persample.kernels.compiled import switched_off
from persample.sources.lock import Lock

Result = TypeVar("Result", bound=tuple[Tensor, ...])

COMPILED = "onednn"  # begins the names of forms that are compiled for each shape and kept, half a megabyte each

_MOST_COMPILED = 8  # shapes of a kind
_MOST_KEYS = 4096
_TRIALS, _TRIALS_IF_SLOW = 4, 2
_SHORT = 1e-3  # seconds: a time that other work on the machine easily doubles, and that costs little to repeat


class Key(NamedTuple):
    """What decides which form is the fastest.

    Attributes:
        kind: what stays the same from batch to batch: the operation, the layer's sizes, dtype and device.
        lengths: what may change: the number of samples first, then those of positions or pixels.
    """

    kind: Hashable
    lengths: tuple[int, ...]


_chosen: dict[Hashable, Callable[..., Any]] = {}
_winners: dict[Hashable, str] = {}
_compiled: dict[Hashable, set[tuple[int, ...]]] = {}
_lock = Lock()
_state = threading.local()


@contextmanager
def deterministic_choice(deterministic: bool) -> Iterator[None]:
    """Within the context, `choose` takes the first form without timing if `deterministic`."""
    before = getattr(_state, "deterministic", False)
    _state.deterministic = deterministic
    try:
        yield
    finally:
        _state.deterministic = before


def is_deterministic() -> bool:
    """Whether nothing may be tried, because results must repeat from run to run."""
    return getattr(_state, "deterministic", False) or torch.are_deterministic_algorithms_enabled()


def choose(key: Key, forms: Callable[[], Mapping[str, Callable[..., Result]]], *operands: Any) -> Result:
    """Return the result of the fastest of `forms`, which all compute the same of `operands` but for rounding.

    On the first call with lengths like these every form is run, and the best are timed, in turns; the winner serves all
    later calls. A form that raises is out, as is one that disagrees with the first of the others. Where the winner
    raises later on (strides are not part of the key), another one takes its place.

    Args:
        key: what decides which form is the fastest.
        forms: gives the forms by name, the one that suits most first.
        operands: what the forms are called with.
    """
    deterministic = is_deterministic()
    mode = "deterministic" if deterministic else torch.get_num_threads(), switched_off() is None
    form = _chosen.get((key, mode))
    if form is not None:
        try:
            found: Result = form(*operands)
            return found
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # a kernel may not take these strides
            pass
    candidates = _affordable(key, deterministic, forms())
    if deterministic:
        name, result = next(_results(candidates, operands))
    else:
        like = (key.kind, mode, tuple(length.bit_length() for length in key.lengths), frozenset(map(_sort, candidates)))
        name, result = _fastest(like, candidates, operands, known=form is None)
    if len(_chosen) >= _MOST_KEYS:
        _chosen.clear()
    _chosen[key, mode] = candidates[name]
    return result


def _affordable(
    key: Key, deterministic: bool, forms: Mapping[str, Callable[..., Result]]
) -> Mapping[str, Callable[..., Result]]:
    """Return the forms without those that would be compiled for one more of many shapes."""
    others = {name: form for name, form in forms.items() if not name.startswith(COMPILED)}
    if len(others) == len(forms):
        return forms
    if deterministic:  # what came before must not decide
        return forms if all(map(_is_round, key.lengths[1:])) else others
    shapes = _compiled.setdefault(key.kind, set())
    if len(shapes) < _MOST_COMPILED:
        shapes.add(key.lengths)
    return forms if key.lengths in shapes else others


def _is_round(length: int) -> bool:
    """Whether it is a power of two, or three times one, as few lengths are."""
    return length > 0 and length // (length & -length) in (1, 3)


def _sort(name: str) -> str:
    """The name of a form without the number of samples that it takes at a time."""
    return name.rstrip("0123456789")


def _fastest(
    like: Hashable, candidates: Mapping[str, Callable[..., Result]], operands: tuple[Any, ...], known: bool
) -> tuple[str, Result]:
    """Return the name of the fastest form, and its result; all are timed unless lengths like these have one `known`."""
    winner = _winners.get(like) if known else None
    if winner is not None:
        alike = [name for name in candidates if _sort(name) == _sort(winner)]
        name = winner if winner in candidates else alike[0]
        for _, result in _results({name: candidates[name]}, operands, may_fail=True):
            return name, result
    name, result = _timed(candidates, operands)
    _winners[like] = name
    return name, result


def _timed(candidates: Mapping[str, Callable[..., Result]], operands: tuple[Any, ...]) -> tuple[str, Result]:
    """Time forms, in turns, and return the name of the fastest, and its result."""
    with _lock.held():
        results, seconds = _those_that_agree(candidates, operands)
        slow = min(seconds.values()) > _SHORT and all(r.is_cpu for r in next(iter(results.values())))
        if slow:  # their first run tells enough to time only the two best, and counts
            best = sorted(seconds, key=seconds.__getitem__)[:2]
            seconds = {name: took for name, took in seconds.items() if name in best}
        else:
            seconds = dict.fromkeys(seconds, math.inf)
        for trial in range((_TRIALS_IF_SLOW if slow else _TRIALS) if len(seconds) > 1 else 0):
            for name in seconds:
                seconds[name] = min(seconds[name], _seconds(candidates[name], operands))
            if trial == 0:  # no more time for those that are out of the question
                limit = 2 * min(seconds.values())
                seconds = {name: took for name, took in seconds.items() if took <= limit}
        # The first, likely one stays where no other is clearly faster: timings are noisy.
        first, winner = next(iter(seconds)), min(seconds, key=seconds.__getitem__)
        if seconds[first] <= 1.05 * seconds[winner]:
            winner = first
    return winner, results[winner]


def _those_that_agree(
    forms: Mapping[str, Callable[..., Result]], operands: tuple[Any, ...]
) -> tuple[dict[str, Result], dict[str, float]]:
    """Run each form once, and return the results that agree with the first of them, and how long each took."""
    results: dict[str, Result] = {}
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    for name, result in _results(forms, operands):
        took = time.perf_counter() - start
        if not results or _agree(result, next(iter(results.values()))):
            results[name], seconds[name] = result, took
        start = time.perf_counter()
    return results, seconds


def _results(
    forms: Mapping[str, Callable[..., Result]], operands: tuple[Any, ...], may_fail: bool = False
) -> Iterator[tuple[str, Result]]:
    """Yield the results of the forms that run, by name; a kernel may not take these shapes or strides.

    Raises:
        RuntimeError: none runs, unless that `may_fail`.
    """
    failed, some_run = None, False
    for name, form in forms.items():
        try:
            result = form(*operands)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            failed = failed or error
            continue
        some_run = True
        yield name, result
    if failed is not None and not some_run and not may_fail:
        raise failed


def _seconds(form: Callable[..., Result], operands: tuple[Any, ...]) -> float:
    _wait_for_gpu()
    start = time.perf_counter()
    form(*operands)
    _wait_for_gpu()
    return time.perf_counter() - start


def _wait_for_gpu() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _agree(result: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    tolerance = 1e-9 if expected[0].dtype == torch.float64 else 1e-4
    return all(
        e.numel() == 0 or bool((r - e).abs().max() <= tolerance * e.abs().max() + 1e-30)
        for r, e in zip(result, expected, strict=True)
    )
