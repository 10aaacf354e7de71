"""Choosing among exact forms of the same result: timed once for each shape, then remembered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result", bound=tuple[Tensor, ...])

_TRIALS = 4
_chosen: dict[Hashable, str] = {}
_lock = threading.Lock()
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


def choose(key: Hashable, forms: Mapping[str, Callable[[], Result]]) -> Result:
    """Return the result of the fastest of `forms`, which all compute the same but for rounding.

    On the first call with a key every form is timed, in turns; the winner serves all later calls. A form that raises,
    or disagrees with the first, is out.
    """
    if getattr(_state, "deterministic", False) or len(forms) == 1:
        return next(iter(forms.values()))()
    key = (key, torch.get_num_threads())
    chosen = _chosen.get(key)
    if chosen is not None:
        return forms[chosen]()
    with _lock:
        results = _those_that_agree(forms)
        seconds = dict.fromkeys(results, float("inf"))
        for trial in range(_TRIALS):
            for name in list(seconds):
                seconds[name] = min(seconds[name], _seconds(forms[name]))
            if trial == 0:  # no more time for those that are out of the question
                limit = 2 * min(seconds.values())
                seconds = {name: took for name, took in seconds.items() if took <= limit}
        _chosen[key] = min(seconds, key=seconds.__getitem__)
    return results[_chosen[key]]


def _those_that_agree(forms: Mapping[str, Callable[[], Result]]) -> dict[str, Result]:
    """Run each form once, and return the results that agree with that of the first."""
    (first, form), *others = forms.items()
    expected = form()
    results = {first: expected}
    for name, form in others:
        try:
            result = form()
        except RuntimeError:  # a kernel that does not take these shapes
            continue
        if _agree(result, expected):
            results[name] = result
    return results


def _seconds(form: Callable[[], Result]) -> float:
    start = time.perf_counter()
    result = form()
    if result[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _agree(result: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    tolerance = 1e-9 if expected[0].dtype == torch.float64 else 1e-4
    return all(
        bool((r - e).abs().max() <= tolerance * e.abs().max() + 1e-30) for r, e in zip(result, expected, strict=True)
    )
