"""The last resort: turning raw errors inside a backend into errors of the package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from traceback import walk_tb
from types import TracebackType

from torch import nn

from persample.errors import RAW_ERRORS, NonFiniteLossError, UnsupportedModelError
from persample.sources.batch import Batch
from persample.sources.contract import Contract
from persample.sources.model.isolation import parameters_guarded
from persample.sources.model.modules import modules_of
from persample.sources.model.random_state import random_state, random_state_restored
from persample.sources.model.refusals import describe
from persample.sources.model.state import State
from persample.sources.selfcheck.oracle import gradient
from persample.sources.selfcheck.returned import ADVICE, name_of


@contextmanager
def in_words(source: Contract, batch: Batch, state: State) -> Iterator[None]:
    """Turn an error of Python or PyTorch into one that says what failed, and where.

    The model is then run as PyTorch runs it without any backend. What fails there, too, is the user's own: an error in
    the forward pass is raised as it is, as are all of other classes. A refusal whose true reason is a loss that is not
    finite becomes that error.

    Args:
        source: the backend.
        batch: what it was given.
        state: that of the model before, from which it is run again.

    Raises:
        UnsupportedModelError: the backend failed on a model that runs, or the model's own backward pass fails.
    """
    try:
        yield
    except UnsupportedModelError as refusal:
        state.put_back()
        not_finite = _not_finite(source, batch)
        if not_finite is not None:
            raise not_finite from refusal
        raise
    except Exception as error:
        if not is_raw(error):
            raise
        state.put_back()
        with _without_trace(source.model):
            losses = source.losses(batch)
            try:
                gradient(losses.sum(), source)
            except Exception as own:
                if not is_raw(own):
                    raise
                raise UnsupportedModelError(
                    f"The model's own backward pass fails in ordinary PyTorch, too ({_described(own)}), so it has no "
                    "gradient: change the model, or how it is called, until loss.backward() runs."
                ) from own
        raise UnsupportedModelError(
            f"Backend {name_of(source)} failed{_where(error.__traceback__, source.model)} ({_described(error)}), on a "
            f"model that PyTorch itself runs. {ADVICE}"
        ) from error


def is_raw(error: Exception) -> bool:
    """Whether an error is one of PyTorch's or Python's own classes, and not for want of memory."""
    return type(error) in RAW_ERRORS and "allocate memory" not in str(error)


def _not_finite(source: Contract, batch: Batch) -> NonFiniteLossError | None:
    """Return the error of losses that are not finite, if they are."""
    with suppress(Exception), _without_trace(source.model):
        try:
            source.losses(batch)
        except NonFiniteLossError as error:
            return error
    return None


@contextmanager
def _without_trace(model: nn.Module) -> Iterator[None]:
    """Restore random number generators and parameters afterwards."""
    with random_state_restored(model, random_state(model)), parameters_guarded(model):
        yield


def _described(error: Exception) -> str:
    message = str(error).strip() or "no message"
    return f"{type(error).__name__}: {message.splitlines()[0].rstrip('.')}"


def _where(traceback: TracebackType | None, model: nn.Module) -> str:
    """Return the operation and module where an error arose, as far as its traceback tells."""
    paths = modules_of(model)
    module = operation = None
    for frame, _ in walk_tb(traceback):
        given = frame.f_locals
        if isinstance(given.get("self"), nn.Module) and given["self"] in paths:
            module, operation = given["self"], None
        elif frame.f_code.co_name == "__torch_function__" and operation is None:
            operation = getattr(given.get("func"), "__name__", None)
    called = f" in {operation}" if operation else ""
    return called + (f" of {describe(paths[module], module)}" if module is not None else "")
