"""What a model may go by while Dynamo captures it, and Dynamo leaves without a guard."""

from __future__ import annotations

import dis
import os
from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from persample.sources.backends.fused.replay.errors import NotReplayableError
from persample.sources.backends.fused.replay.namespaces import Namespaces

_FOLDER_OF_PYTORCH = str(Path(torch.__file__).parent)

# Packages that catch errors for what is guarded or seen all the same, as variables of the environment are, or makes no
# difference to numbers, as the signatures of functions.
_MAY_CATCH = ("torch", "os", "inspect")

_KEY_IS_MISSED = "_persample_key_is_missed"  # marks Dynamo's context of a capture


def see_unguarded(scope: Mapping[str, Any], given: Sequence[str], known: Container[int], seen: Namespaces) -> None:
    """See to what Dynamo, which is capturing, leaves without a guard.

    No guard sees what was looked for in vain and comes later, a method that a class of PyTorch's has got anew, nor that
    an `OrderedDict` was put into another order.

    Args:
        scope: the local variables `"L"` and the global ones `"G"` of the captured function.
        given: the names of local variables that are others in each call.
        known: the ids of objects of which it is known already what they hold.
        seen: takes what is to be seen from now on.

    Raises:
        NotReplayableError: the model goes by something that cannot be seen.
    """
    from torch._dynamo.guards import GuardBuilder
    from torch._guards import TracingContext

    context = TracingContext.get()
    key_is_missed = hasattr(context, _KEY_IS_MISSED)
    codes = [code for code in context.traced_code if not code.co_filename.startswith(_FOLDER_OF_PYTORCH)]
    if any(step.opname == "MATCH_KEYS" for code in codes for step in dis.get_instructions(code)):
        raise NotReplayableError("the model matches the keys of a mapping (`match`)")
    names = {name for code in codes for name in (*code.co_names, *code.co_consts) if isinstance(name, str)}
    seen.add_names(os.environ._data, map(os.environ.encodekey, names))  # type: ignore[attr-defined]
    own = _names_of(given)
    for guard in context.guards_context.dynamo_guards:
        if guard.inner_create_fn() not in (GuardBuilder.TYPE_MATCH, GuardBuilder.MODULE_MATCH):
            continue
        if guard.name.startswith("G['__import_torch"):
            continue
        value = eval(guard.name, dict(scope))  # Dynamo's name of a value is an expression
        if guard.name.startswith(own):
            # Keyword arguments have guards on their names.
            if key_is_missed and isinstance(value, Mapping) and guard.name != "L['kwargs']":
                raise _catching()
            continue
        if id(value) in known or isinstance(value, Tensor):
            continue
        if isinstance(value, OrderedDict):
            seen.add_order(value)
        if key_is_missed:
            seen.add_keys(value)
        seen.add_object(value, names)
        seen.add_class(type(value))


def guard_identities(given: Sequence[str]) -> None:
    """Let Dynamo, which is capturing, guard the identity of objects of which it would guard the type.

    `config.kind is KIND` goes by it.

    Args:
        given: the names of variables that are others in each call.
    """
    from torch._dynamo.guards import GuardBuilder
    from torch._guards import TracingContext

    guards, own = TracingContext.get().guards_context.dynamo_guards, _names_of(given)
    for guard in [*guards]:
        if guard.inner_create_fn() is GuardBuilder.TYPE_MATCH and not guard.name.startswith(own):
            guards.add(guard.originating_source.make_guard(GuardBuilder.ID_MATCH))


def _names_of(given: Sequence[str]) -> tuple[str, ...]:
    """Return how the names of guards on these local variables begin."""
    return tuple([f"L['{name}']" for name in given])


@contextmanager
def catching_refused() -> Iterator[None]:
    """Refuse models that catch an error while Dynamo captures them: no guard sees that it does not come any more.

    Why Python code comes to a `raise` is guarded. A key or an attribute that is missing is not; of a key that is looked
    up in brackets, `see_unguarded` sees to it.

    Raises:
        NotReplayableError: one does, out of the capture.
    """
    from torch._dynamo import symbolic_convert
    from torch._dynamo.exc import ObservedKeyError, ObservedUserStopIteration

    frames: Any = symbolic_convert.InstructionTranslatorBase
    handle = frames.exception_handler

    def refuse(frame: Any, error: Any) -> None:
        if "is_raised" not in vars(error):
            step = frame.current_instruction
            error.is_raised = step.opname == "RAISE_VARARGS"
            looked_up = step.opname == "BINARY_SUBSCR" or (step.opname == "BINARY_OP" and step.argrepr == "[]")
            error.is_missing_key = looked_up and isinstance(error, ObservedKeyError)
        handle(frame, error)  # raises the error where this frame does not catch it
        where = frame.f_globals["__name__"].partition(".")[0]
        # The generator of a context manager ends where its code, which is captured, does.
        is_end = where == "contextlib" and isinstance(error, ObservedUserStopIteration)
        if error.is_raised or where in _MAY_CATCH or is_end:
            return
        if not error.is_missing_key:
            raise _catching()
        setattr(frame.output.tracing_context, _KEY_IS_MISSED, True)

    frames.exception_handler = refuse
    try:
        yield
    finally:
        frames.exception_handler = handle


def _catching() -> NotReplayableError:
    return NotReplayableError("the model catches an error")
