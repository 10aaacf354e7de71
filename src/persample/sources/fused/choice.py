"""Choosing among exact forms of the same result: timed once for each shape, then remembered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from persample.sources.lock import Lock

Result = TypeVar("Result", bound=tuple[Tensor, ...])

_TRIALS = 4


class Chosen(NamedTuple):
    """The fastest form, and its name."""

    name: str
    form: Callable[..., Any]


_chosen: dict[Hashable, Chosen] = {}
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


def choose(key: Hashable, forms: Callable[[], Mapping[str, Callable[..., Result]]], *operands: Any) -> Result:
    """Return the result of the fastest of `forms`, which all compute the same of `operands` but for rounding.

    On the first call with a key every form is timed, in turns; the winner serves all later calls. A form that raises
    is out, as is one that disagrees with the first of the others. Where the winner raises later on (strides are not
    part of the key), another one takes its place.

    Args:
        key: what decides which form is the fastest: shapes, dtype, device.
        forms: gives the forms by name, the one that suits most first.
        operands: what the forms are called with.
    """
    deterministic = getattr(_state, "deterministic", False) or torch.are_deterministic_algorithms_enabled()
    key = (key, "deterministic" if deterministic else torch.get_num_threads())
    chosen = _chosen.get(key)
    if chosen is not None:
        try:
            earlier: Result = chosen.form(*operands)
            return earlier
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # a kernel that does not take these strides
            pass
    candidates = forms()
    name, result = next(_results(candidates, operands)) if deterministic else _fastest(candidates, operands)
    _chosen[key] = Chosen(name, candidates[name])
    return result


def _fastest(candidates: Mapping[str, Callable[..., Result]], operands: tuple[Any, ...]) -> tuple[str, Result]:
    """Time all forms, in turns, and return the name of the fastest, and its result."""
    with _lock.held():
        results = _those_that_agree(candidates, operands)
        seconds = dict.fromkeys(results, 0.0)
        for trial in range(_TRIALS if len(results) > 1 else 0):
            for name in seconds:
                took = _seconds(candidates[name], operands)
                seconds[name] = took if trial == 0 else min(seconds[name], took)
            if trial == 0:  # no more time for those that are out of the question
                limit = 2 * min(seconds.values())
                seconds = {name: took for name, took in seconds.items() if took <= limit}
        # The first, likely one stays where no other is clearly faster: timings are noisy.
        first, winner = next(iter(seconds)), min(seconds, key=seconds.__getitem__)
        if seconds[first] <= 1.05 * seconds[winner]:
            winner = first
    return winner, results[winner]


def _those_that_agree(forms: Mapping[str, Callable[..., Result]], operands: tuple[Any, ...]) -> dict[str, Result]:
    """Run each form once, and return the results that agree with the first of them."""
    results: dict[str, Result] = {}
    for name, result in _results(forms, operands):
        if not results or _agree(result, next(iter(results.values()))):
            results[name] = result
    return results


def _results(forms: Mapping[str, Callable[..., Result]], operands: tuple[Any, ...]) -> Iterator[tuple[str, Result]]:
    """Yield the results of the forms that run, by name; a kernel may not take these shapes or strides.

    Raises:
        RuntimeError: none runs.
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
    if failed is not None and not some_run:
        raise failed


def _seconds(form: Callable[..., Result], operands: tuple[Any, ...]) -> float:
    start = time.perf_counter()
    result = form(*operands)
    if result[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _agree(result: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    tolerance = 1e-9 if expected[0].dtype == torch.float64 else 1e-4
    return all(
        e.numel() == 0 or bool((r - e).abs().max() <= tolerance * e.abs().max() + 1e-30)
        for r, e in zip(result, expected, strict=True)
    )
