"""Letting Dynamo capture a step: with all of its guards, and so that nothing of it stays behind."""

from __future__ import annotations

import logging
import os
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from persample.sources.backends.fused.propagation import by_trial
from persample.sources.backends.fused.replay.guards import catching_refused

MOST_GRAPHS = 8  # for one step


def renewed(function: types.FunctionType) -> types.FunctionType:
    """Return the same function, with code and globals of its own.

    Dynamo keeps its graphs with the code and the compiled functions with the globals: so they go with the function, and
    other functions of the same code do not count for its limit.
    """
    known = function.__globals__
    own = {name: known[name] for name in ("__builtins__", "__name__", *function.__code__.co_names) if name in known}
    return types.FunctionType(function.__code__.replace(), own, function.__name__, closure=function.__closure__)


def prepare() -> None:
    """Import Dynamo, and let it wrap methods of `nn.Module` now, which it would at its first use."""
    with _environment_kept():
        from torch._dynamo.mutation_guard import install_generation_tagging_init

    install_generation_tagging_init()


@contextmanager
def capturing() -> Iterator[list[str]]:
    """Let Dynamo capture, with all of its guards; yield the list that has its warnings afterwards."""
    import torch._dynamo as dynamo

    texts: list[str] = []
    told = set(dynamo.utils.warn_once_cache)
    dynamo.utils.warn_once_cache.clear()
    careful = dynamo.config.patch(
        allow_rnn=True,
        recompile_limit=2 * MOST_GRAPHS,  # it would warn
        skip_nnmodule_hook_guards=False,
        suppress_errors=False,
        trace_numpy=False,
        use_numpy_random_stream=True,
    )
    try:
        stance = torch.compiler.set_stance("default")
        with warnings.catch_warnings(record=True) as caught, careful, stance, _nothing_left(), catching_refused():
            warnings.simplefilter("always")
            yield texts
        texts += [str(warning.message) for warning in caught]
    finally:
        dynamo.utils.warn_once_cache.update(told)


@contextmanager
def _nothing_left() -> Iterator[None]:
    """Let nothing of the capture stay behind."""
    with _marks_taken_off(), _environment_kept(), _caches_kept_clean(), _failed_trials_not_logged():
        yield


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Take variables out of the environment that PyTorch has put in: other processes would have them, too."""
    before = set(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before:
            del os.environ[name]


@contextmanager
def _marks_taken_off() -> Iterator[None]:
    """Take off the attribute that Dynamo marks the tensors of a model with: copies would have it, too."""
    from torch._dynamo import decorators

    mark = decorators.mark_static_address
    marks: list[tuple[Tensor, str]] = []

    def mark_and_note(t: Tensor, *args: Any, **kwargs: Any) -> None:
        before = set(vars(t))
        mark(t, *args, **kwargs)
        marks.extend((t, name) for name in vars(t).keys() - before)

    decorators.mark_static_address = mark_and_note
    try:
        yield
    finally:
        decorators.mark_static_address = mark
        for t, name in marks:
            vars(t).pop(name, None)


@contextmanager
def _failed_trials_not_logged() -> Iterator[None]:
    """Keep PyTorch from logging an error where an operation does not take the sizes that it is tried with."""
    from torch._subclasses.fake_tensor import log

    def drop(record: logging.LogRecord) -> bool:
        return False

    log.addFilter(drop)
    try:
        yield
    finally:
        log.removeFilter(drop)


@contextmanager
def _caches_kept_clean() -> Iterator[None]:
    """Let no tensor without values stay behind in a cache."""
    try:
        yield
    finally:
        by_trial._codes.cache_clear()
        by_trial._owners_of_codes.cache_clear()
