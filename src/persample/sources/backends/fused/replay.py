"""Replaying a step: forward pass, backward pass and moments, recorded once as a flat list of ATen operations.

1. Dynamo captures forward pass and loss as a graph with *guards* on all that Python decided: modules, flags, shapes,
   values. Where a guard fails, it captures anew.
2. At the first call of such a graph, the capture of this backend runs over it on tensors without values (`FakeTensor`)
   while `make_fx` writes down every operation, those of the backward pass and of the contributions included. Whatever
   looks at a value fails there, so no decision of that kind gets into the list.
3. The list is run once from where the ordinary call began. Only if it gives the same results, the same state of the
   model and the same random numbers does it serve later calls. The results must be the same bit for bit, so that it
   does not matter when a step is recorded: a run that is killed and resumed begins with ordinary calls again.

A step that fails in 1, 2 or 3 goes the ordinary way, and `Replay.reason` says why.
"""

from __future__ import annotations

import logging
import math
import os
import re
import sys
import time
import types
import warnings
import weakref
from abc import get_cache_token
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import gt, is_
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree as pytree
from torch.utils._device import DeviceContext

from persample.kernels.autotune import deterministic_choice
from persample.losses import require_losses
from persample.sources.backends.fused import nan_probe
from persample.sources.backends.fused.namespaces import Namespaces
from persample.sources.backends.fused.patience import Patience
from persample.sources.backends.fused.recorded_graph import (
    NotReplayableError,
    flat_graph,
    guard_identities,
    refuse_graph,
)
from persample.sources.backends.fused.request import Request, put_together, taken_apart
from persample.sources.backends.fused.runners import NotServedError, Run, Way, changes_nothing, first_line, runner
from persample.sources.backends.fused.unguarded import catching_refused, see_unguarded
from persample.sources.batch import Batch
from persample.sources.model.eager import compiling_is_off
from persample.sources.model.isolation import Held, State
from persample.sources.model.modules import modules_of
from persample.sources.model.random_state import random_state, same_random_state, set_random_state
from persample.sources.model.recurrent_layers import repeatable

_log = logging.getLogger(__name__)

# When a step is recorded for which nobody has asked.
_CALLS, _SECONDS = 10, 0.1
_IN_VAIN = "what was recorded has served no later call"

_MOST_STEPS = 8
_MOST_GRAPHS = 8  # of Dynamo's for one step
_MOST_WANTED = 8  # different results of one graph
_MOST_CLOSED = 64  # results that are known not to be recorded
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
_MOVES, _UNITS = 5, 8  # how often parameters are moved, and by how many units in the last place


class Ordinary(Protocol):
    """What is known of the source whose steps are replayed."""

    model: nn.Module
    loss_fn: Callable[[Any, Any], Any]
    deterministic: bool
    ordinary_state: bool

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that require a gradient, by name."""

    def state(self) -> State:
        """Return what the model keeps from one forward pass to the next, as it is now."""

    def recorded_with(
        self,
        losses: Callable[[], Tensor],
        parameters: dict[str, Any],
        batch: Batch,
        what: Request,
        own: Sequence[Tensor],
    ) -> tuple[Any, bool]:
        """Return what is wanted of a batch, with other parameters and what else runs model and loss.

        Also whether the state that is left on the model is that of an ordinary forward pass.
        """


class Replay:
    """The recorded steps of one source.

    Nothing of them is copied or pickled: a copy begins without any.

    Args:
        way: how recorded operations are run.
        by_itself: whether nobody has asked for it. Then a step is recorded when it is worth it (see `Patience`), and
            nothing is said if it cannot be.

    Attributes:
        reason: why the last step was not replayed, or not in that way; empty if it was, or if it is too early to try.
        ran: how it was run; None if not by recorded operations.
    """

    def __init__(self, way: Way, *, by_itself: bool = False) -> None:
        self.reason = ""
        self.ran: Way | None = None
        self.by_itself = by_itself
        self._way = way
        self._patience = Patience(_CALLS, _SECONDS) if by_itself else None
        self._steps: list[_Step] = []
        self._told: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return vars(Replay(self._way, by_itself=self.by_itself))

    def run(self, source: Ordinary, batch: Batch, what: Request) -> Any:
        """Return what is wanted of `batch`, by a recorded step or the ordinary way."""
        if self._patience is None or self._patience.is_due(kind := _kind(batch, what)):
            result = self._result(source, batch, what)
            return what.compute(source, batch, what.tensors) if result is None else result
        self.reason, self.ran = "", None
        start = time.perf_counter()
        result = what.compute(source, batch, what.tensors)
        self._patience.came(kind, time.perf_counter() - start)
        return result

    def _result(self, source: Ordinary, batch: Batch, what: Request) -> Any:
        """Return what is wanted by a recorded step, or while one is recorded; None if it must go the ordinary way."""
        self.reason, self.ran, result = _beyond_replay(source, batch), None, None
        if not self.reason:
            step = next((step for step in self._steps if step.fits(source)), None)
            lost = self._patience is not None and self._patience.is_lost
            if step is None and len(self._steps) >= _MOST_STEPS:
                self.reason = f"attributes of the model have changed {_MOST_STEPS} times"
            elif step is None and lost:
                self.reason = _IN_VAIN
            else:
                if step is None:
                    step = _Step(source, self._way)
                    self._steps.append(step)
                start = time.perf_counter()
                result = step.result(source, batch, what, may_record=not lost)
                self.reason, self.ran = step.ran_because, step.ran
                if self._patience is not None and step.was_recorded:
                    self._patience.recorded(time.perf_counter() - start)
                elif self._patience is not None and step.ran is not None:
                    self._patience.served()
        self._tell()
        return result

    def leave(self, reason: str) -> None:
        """Note that a step goes the ordinary way."""
        self.reason, self.ran = reason, None
        self._tell()

    def _tell(self) -> None:
        if self.reason and self.reason not in self._told:
            self._told.add(self.reason)
            left = f" by {self._way}" if self.ran else ""
            level = logging.INFO if self.by_itself else logging.WARNING
            _log.log(level, "Backend 'fused' does not replay the step of this model%s: %s.", left, self.reason)


class _NotRecordedError(Exception):
    """No graph fits this call. Nothing was run."""


class _RecordedError(Exception):
    """A step was recorded and run for the first time. What Python does after it has been done by the ordinary call."""


class _FailedError(Exception):
    """A recorded step raised an error, and the same call may go the ordinary way, which tells it better."""


class _Step:
    """Forward pass and loss of one model in one state of its attributes, compiled.

    Dynamo's guards have gaps: a key that a dict lacks, the order of an `OrderedDict`, a method that a class of
    PyTorch's has got anew. So all that modules hold must be what it was, by identity, and so must be the methods of
    their classes and of those of other objects that Dynamo has met.

    Attributes:
        ran: how it was run at last; None if in the ordinary way.
        ran_because: why not in the way that was asked for.
        was_recorded: whether it was recorded then, or at least tried to be.
        graphs: those that Dynamo has captured.
        held: what the modules hold.
        names: what the classes of modules, and other classes and modules that Dynamo has met, define.
    """

    def __init__(self, source: Ordinary, way: Way) -> None:
        self.call: _Call | None = None
        self.deterministic = source.deterministic
        self.way = way
        self.ran: Way | None = None
        self.ran_because = ""
        self.was_recorded = False
        self.graphs: list[_Graph] = []
        self._served: set[Hashable] = set()  # what has been recorded, for a kind of batch at least
        self._closed: dict[Hashable, str] = {}  # why it is not recorded for further kinds
        from torch._dynamo.mutation_guard import install_generation_tagging_init

        install_generation_tagging_init()  # it wraps methods of nn.Module, at Dynamo's first use otherwise
        self._key = _key(source)
        self.held, self.names = Held(source.model), Namespaces()
        for kind in dict.fromkeys(map(type, self.held.modules)):
            self.names.add_class(kind)
        self._compiled: Callable[..., Any] | None = None  # until it is recorded

    def fits(self, source: Ordinary) -> bool:
        """Whether it is of this source as it is now."""
        return not self.held.changed() and not self.names.changed() and self._key == _key(source)

    def result(self, source: Ordinary, batch: Batch, what: Request, *, may_record: bool) -> Any:
        """Return what is wanted of `batch`, or None if the step cannot be replayed."""
        self.ran, self.ran_because, self.was_recorded = None, self._closed.get(what.key, ""), False
        if self.ran_because and what.key not in self._served:
            return None
        if self._compiled is not None:
            try:
                # Dynamo captures nothing here: where no graph fits, it runs the function itself, which raises.
                with torch.compiler.set_stance("eager_on_recompile"):
                    return self._replayed(self._compiled, _Call(source, batch, what))
            except _NotRecordedError:
                pass
            except (NotReplayableError, _FailedError) as error:  # before anything was run, or changed
                self.ran_because = str(error)
        if not may_record:
            self.ran_because = self.ran_because or _IN_VAIN
        return None if self.ran_because else self._recorded(source, batch, what)

    def _replayed(self, compiled: Callable[..., Any], call: _Call) -> Any:
        self.call = call
        try:
            with repeatable(call.source.model):
                compiled(*call.arguments)
        except _RecordedError:
            pass
        finally:
            self.call = None
        require_losses(call.losses, call.batch.size)
        return call.result

    def run(self, graph: _Graph, inputs: Sequence[Tensor]) -> tuple[Tensor]:
        """Run one of the graphs; Dynamo's code calls it.

        Raises:
            _NotRecordedError: it is not recorded, and may not be now.
            _RecordedError: it has been recorded and run for the first time.
            NotReplayableError: it cannot be, or its operands are not those that it was recorded for.
        """
        call = self.call
        assert call is not None
        call.graph = graph
        operands, recording = graph.operands(inputs, call), graph.recordings.get(call.what.key)
        if recording is None:
            if not call.may_record:
                raise _NotRecordedError
            recording = graph.record(operands, call)
        elif _sharing(operands) != recording.sharing:
            raise NotReplayableError(
                "tensors share memory that did not when the step was recorded, or the other way round"
            )
        with torch.no_grad(), torch._C._DisableAutocast(), deterministic_choice(self.deterministic):
            if recording.run is None:
                recording.make_ready(self.way, operands)
            try:
                losses, *results = recording.run(*operands)  # type: ignore[misc]
            except RuntimeError as error:
                if call.may_record or not recording.is_repeatable:
                    raise
                raise _FailedError(f"it failed ({_in_one_line(error)})") from error
        call.losses, call.result = losses, put_together(recording.form, results)
        call.source.ordinary_state = recording.ordinary_state
        self.ran, self.ran_because = recording.way, recording.because
        if call.may_record:
            raise _RecordedError
        return (losses,)

    def _recorded(self, source: Ordinary, batch: Batch, what: Request) -> Any:
        """Return the result of the ordinary way, and record the step if it gives the same."""
        self.was_recorded = True
        state, start = source.state(), random_state(source.model)
        given = [(t, t.clone()) for t, *_ in batch.followed()]
        result = what.compute(source, batch, what.tensors)
        after, drawn = source.state(), random_state(source.model)
        ordinary_state = source.ordinary_state
        if not all(torch.equal(t, before) for t, before in given):
            self._close(what, "the model changes the batch in place, or there are NaNs in it")
            return result
        state.put_back()
        set_random_state(start)
        reason, call = "", _Call(source, batch, what, may_record=True)
        try:
            with _capturing() as warned, _caches_kept_clean():
                if self._compiled is None:
                    self._compiled = _compiled(source.model, source.loss_fn, self)
                replayed = self._replayed(self._compiled, call)
            if any("lru_cache" in text for text in warned):
                reason = "a function of the model remembers its results (functools.cache)"
            elif not same_random_state(drawn, random_state(source.model)):
                reason = "the recorded step draws other random numbers"
            elif after.changed():
                reason = "the recorded step leaves another state on the model"
            else:

                def again() -> Any:
                    state.put_back()
                    set_random_state(start)
                    return what.compute(source, batch, what.tensors)

                reason = self._other_numbers(result, replayed, again, [*source.parameters().values()])
        except Exception as error:  # noqa: BLE001 - whatever Dynamo or a tensor without values cannot do: a reason
            reason = _in_one_line(error)
        finally:
            after.put_back()
            set_random_state(drawn)
        self._key = _key(source)  # what is imported for recording registers classes
        if reason:
            self._close(what, reason)
            if call.graph is not None:
                call.graph.recordings.pop(what.key, None)
        else:
            self._served.add(what.key)
        source.ordinary_state = ordinary_state
        return result

    def _other_numbers(
        self, result: Any, replayed: Any, again: Callable[[], Any], parameters: Sequence[nn.Parameter]
    ) -> str:
        """Return why the recorded step may not serve, by its numbers; empty if it may.

        Args:
            result: that of the ordinary way.
            replayed: that of the recorded step.
            again: computes the first once more.
            parameters: those of the model.
        """
        off = _off(result, replayed)
        if self.ran == "operations" and any(off) and not any(_off(result, again())):
            return "the recorded step rounds otherwise"  # and not because every call does
        allowed = [_tolerance(tensor) for tensor in taken_apart(result)[0]]
        if self.ran != "operations" and any(map(gt, off, allowed)):
            # Where a ReLU stands at zero, rounding may change a gradient as much as if the last bits of parameters did.
            for seed in range(_MOVES):
                with _moved(parameters, seed):
                    allowed = [max(most, 2 * moved) for most, moved in zip(allowed, _off(result, again()), strict=True)]
        return "the recorded step gives other numbers" if any(map(gt, off, allowed)) else ""

    def _close(self, what: Request, reason: str) -> None:
        """Let what is wanted go the ordinary way from now on, but for kinds of batches that have been recorded."""
        if len(self._closed) >= _MOST_CLOSED:
            self._closed.clear()
        self._closed[what.key] = self.ran_because = reason
        self.ran = None


class _Call:
    """One call of a step.

    Attributes:
        tensors: those of the batch.
        graph: that of Dynamo's which serves it, once it is known.
        losses: of the samples, once they are there.
        result: what was wanted, once it is there.
    """

    def __init__(self, source: Ordinary, batch: Batch, what: Request, *, may_record: bool = False) -> None:
        self.source, self.batch, self.what, self.may_record = source, batch, what, may_record
        self.parameters = source.parameters()
        self.arguments = batch.for_a_call()
        self.tensors = [leaf for leaf in pytree.tree_leaves(self.arguments) if isinstance(leaf, Tensor)]
        self.graph: _Graph | None = None
        self.losses = torch.empty(0)
        self.result: Any = None


class _Graph:
    """A graph of Dynamo's, and what was recorded of it.

    It holds neither the model nor the step: Dynamo keeps it as long as the code of the step.

    Attributes:
        recordings: what was recorded, by what was wanted.
    """

    # Dynamo copies the `__dict__` of what it is given into a function of its own.
    __slots__ = ("_captured", "_others", "_parameters", "_step", "_tensors", "recordings")

    def __init__(self, graph: GraphModule, examples: Sequence[Tensor], step: weakref.ref[_Step], call: _Call) -> None:
        self.recordings: dict[Hashable, _Recording] = {}
        self._captured, self._step = graph, step
        named, numbered = {id(p): n for n, p in call.parameters.items()}, {id(t): n for n, t in enumerate(call.tensors)}
        self._parameters = {i: named[id(t)] for i, t in enumerate(examples) if id(t) in named}
        self._tensors = {i: numbered[id(t)] for i, t in enumerate(examples) if id(t) in numbered}
        if any(t.requires_grad and i not in self._parameters for i, t in enumerate(examples)):
            raise NotReplayableError("a tensor that is no parameter of the model requires a gradient")
        self._others = [name for name in call.parameters if name not in self._parameters.values()]  # are not reached

    def __call__(self, *inputs: Any) -> tuple[Tensor]:
        step = self._step()
        if step is None:
            raise NotReplayableError("its source is gone")
        return step.run(self, inputs)

    def operands(self, inputs: Sequence[Tensor], call: _Call) -> list[Tensor]:
        """Return the operands of a recorded step: those of the graph, other parameters, and what is wanted needs.

        Raises:
            NotReplayableError: others take part than those that the graph was captured with.
        """
        due = [call.parameters.get(name) for name in self._parameters.values()]
        given = [call.tensors[number] for number in self._tensors.values()]
        found = [inputs[i] for i in (*self._parameters, *self._tensors)]
        if not all(map(is_, (*due, *given), found)):
            raise NotReplayableError(
                "other tensors take part in the step than the parameters and the batch it began with"
            )
        return [*inputs, *[call.parameters[name] for name in self._others], *call.what.tensors]

    def record(self, operands: Sequence[Tensor], call: _Call) -> _Recording:
        """Write down the operations of the step."""
        if len(self.recordings) >= _MOST_WANTED:
            raise NotReplayableError(f"more than {_MOST_WANTED} different results are wanted of it")
        others = len(operands) - len(self._others) - len(call.what.tensors)
        names = self._parameters | dict(enumerate(self._others, others))
        form: Any = None
        ordinary_state = False

        def compute(losses: Callable[[], Tensor], fake: Sequence[Tensor]) -> Sequence[Tensor]:
            nonlocal form, ordinary_state
            tensors = iter([self._in_place_of(number, fake, tensor) for number, tensor in enumerate(call.tensors)])
            tree = pytree.tree_map(lambda x: next(tensors) if isinstance(x, Tensor) else x, call.arguments)
            found: list[Tensor] = []

            def noted() -> Tensor:
                found.append(losses())
                return found[-1]

            own = fake[len(operands) - len(call.what.tensors) :]
            operand_of = {name: fake[i] for i, name in names.items()}
            parameters = {name: operand_of[name] for name in call.parameters}
            batch = Batch(tree[0], tree[1], tree[2], call.batch.size)
            result, ordinary_state = call.source.recorded_with(noted, parameters, batch, call.what, own)
            results, form = taken_apart(result)
            return [found[0].detach(), *results]

        recorded = flat_graph(self._captured, operands, list(names), compute)
        staying = [i for i in range(others) if i not in self._tensors]
        self.recordings[call.what.key] = _Recording(recorded, form, ordinary_state, _sharing(operands), staying)
        return self.recordings[call.what.key]

    def _in_place_of(self, number: int, operands: Sequence[Tensor], tensor: Tensor) -> Tensor:
        """Return the operand for a tensor of the batch, or that itself if the graph does not take it."""
        return next((operands[i] for i, n in self._tensors.items() if n == number), tensor)


class _Recording:
    """The operations of a step, and how they are run.

    Attributes:
        form: of the result, with places for the tensors.
        ordinary_state: whether the state that is left on the model is that of an ordinary forward pass.
        sharing: which operands share memory.
        is_repeatable: whether it changes nothing: no state of the model, no random number generator.
        run: runs the operations; None before.
        way: how they are run.
        because: why not in the way that was asked for.
    """

    def __init__(
        self,
        recorded: GraphModule,
        form: Any,
        ordinary_state: bool,
        sharing: tuple[int, ...],
        staying: Sequence[int],
    ) -> None:
        self.form, self.ordinary_state, self.sharing = form, ordinary_state, sharing
        self.run: Run | None = None
        self.way: Way = "operations"
        self.because = ""
        self.is_repeatable = changes_nothing(recorded)
        self._recorded, self._staying = recorded, staying

    def make_ready(self, way: Way, operands: Sequence[Tensor]) -> None:
        """Let the operations be run in a way, or else one by one."""
        try:
            self.run, self.way = runner(way, self._recorded, operands, self._staying), way
        except NotServedError as error:
            self.run, self.because = self._recorded.forward, str(error)


def _key(source: Ordinary) -> tuple[Any, ...]:
    """Return what decides how a step runs, besides the attributes of the model."""
    return (
        *(id(source.model), id(source.loss_fn), source.deterministic, get_cache_token()),
        *[mode.device for mode in _get_current_function_mode_stack() if isinstance(mode, DeviceContext)],
        *[torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda")],
        *dict.fromkeys(map(type, modules_of(source.model))),
    )


def _compiled(model: nn.Module, loss_fn: Callable[[Any, Any], Any], asking: _Step) -> Callable[..., Any]:
    """Return the losses of a batch as a function that Dynamo captures for a step."""
    step = weakref.ref(asking)
    NotRecordedError = _NotRecordedError  # noqa: N806 - a name of the code that Dynamo sees, see below

    def losses_of_batch(args: tuple[Any, ...], kwargs: Mapping[str, Any], targets: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            raise NotRecordedError
        return loss_fn(model(*args, **kwargs), targets)

    def backend(graph: GraphModule, examples: list[Any]) -> _Graph:
        asking = step()
        if asking is None:
            raise NotReplayableError("its source is gone")
        refuse_graph(graph, examples)
        if len(asking.graphs) >= _MOST_GRAPHS:
            raise NotReplayableError(f"Dynamo has captured it {_MOST_GRAPHS} times")
        assert asking.call is not None
        source, given = asking.call.source, ("args", "kwargs", "targets")
        known = {"model": source.model, "loss_fn": source.loss_fn}
        scope = {"L": known | dict(zip(given, asking.call.arguments, strict=True)), "G": own_globals}
        see_unguarded(scope, given, asking.held.ids(), asking.names)
        guard_identities(given)
        asking.graphs.append(_Graph(graph, examples, step, asking.call))
        return asking.graphs[-1]

    # Dynamo keeps its graphs with the code and the compiled functions with the globals, so both are made anew: they go
    # with the step, and the steps of other sources do not count for its limit.
    builtins = {"__builtins__": __builtins__, "__name__": __name__}
    own_globals: dict[str, Any] = {**builtins, "torch": torch, "NotRecordedError": _NotRecordedError}
    own = types.FunctionType(
        losses_of_batch.__code__.replace(), own_globals, "losses_of_batch", closure=losses_of_batch.__closure__
    )
    # Dynamo never lets go of its guards, they hold the globals, and those the graphs.
    weakref.finalize(asking, _empty, asking.graphs).atexit = False
    compiled: Callable[..., Any] = torch.compile(own, backend=backend, fullgraph=True, dynamic=False)
    return compiled


def _empty(graphs: list[_Graph]) -> None:
    for graph in graphs:
        graph.recordings.clear()
        del graph._captured


def _beyond_replay(source: Ordinary, batch: Batch) -> str:
    """Return why a step is not worth trying; empty if it is."""
    if batch.split_tree is not None:
        return "the samples are not in dim 0 of all tensors of the batch"
    if any(type(t) is not Tensor or t.requires_grad or t.layout is not torch.strided for t in _tensors_of(batch)):
        return "a tensor of the batch requires a gradient, or is of a special kind"
    if (
        any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    ):
        return "a mode of PyTorch is active (one of your own, a transform, hooks on saved tensors)"
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return "it is captured in a CUDA graph of your own"
    if compiling_is_off():
        return "PyTorch is told to compile nothing"
    if torch.is_anomaly_enabled():
        return "autograd looks for anomalies"
    if _is_watched():
        return "a debugger or another tracer looks at the model"
    if nn.modules.module._has_any_global_hook():
        return "there are hooks on all modules"
    if any(module._backward_hooks or module._backward_pre_hooks for module in modules_of(source.model)):
        return "a module has backward hooks"
    return ""


def _is_watched() -> bool:
    """Whether a debugger, say, wants to see the lines of the model that are run."""
    monitoring = getattr(sys, "monitoring", None)
    return sys.gettrace() is not None or (monitoring is not None and monitoring.get_tool(0) is not None)


def _kind(batch: Batch, what: Request) -> Hashable:
    """Return what batches of one kind have in common."""
    return what.key, batch.kind(), *[t.shape for t in _tensors_of(batch)]


def _tensors_of(batch: Batch) -> list[Tensor]:
    leaves = pytree.tree_leaves((batch.args, dict(batch.kwargs), batch.targets))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _sharing(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Return for each tensor the number of the first that shares its memory."""
    first: dict[int, int] = {}
    return tuple([first.setdefault(t.untyped_storage().data_ptr(), i) for i, t in enumerate(tensors)])


def _off(expected: Any, found: Any) -> list[float]:
    """Return how much the tensors of a result are off, over the largest entry of each."""
    one, other = taken_apart(expected)[0], taken_apart(found)[0]
    return [*map(_off_by, one, other)] if len(one) == len(other) else [math.inf]


def _off_by(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return math.inf
    same = (expected == found) | (expected != expected) & (found != found)  # both are NaN
    if same.all():
        return 0.0
    if not expected.dtype.is_floating_point and not expected.dtype.is_complex:
        return math.inf
    most = (found - expected).masked_fill(same, 0).abs().nan_to_num(math.inf).max().item()
    size = expected.abs().nan_to_num(0.0, 0.0, 0.0).max().item()
    return most / size if size else math.inf


def _tolerance(tensor: Tensor) -> float:
    """How much a result may be off because of the order of additions in a kernel."""
    kind = tensor.dtype if tensor.dtype.is_floating_point or tensor.dtype.is_complex else torch.float32
    return _TOLERANCE.get(kind, 4 * torch.finfo(kind).eps)


@contextmanager
def _moved(parameters: Iterable[nn.Parameter], seed: int) -> Iterator[None]:
    """Let the last bits of parameters be others inside the context."""
    kept = [(p, p.detach().clone()) for p in parameters]
    try:
        for p, values in kept:
            generator = torch.Generator(p.device).manual_seed(seed)
            units = torch.randint(-_UNITS, _UNITS + 1, p.shape, device=p.device, generator=generator).to(p.dtype)
            p.data.copy_(values * (1 + units * torch.finfo(p.dtype).eps))
        yield
    finally:
        for p, values in kept:
            p.data.copy_(values)


@contextmanager
def _caches_kept_clean() -> Iterator[None]:
    """Let no tensor without values stay behind in a cache."""
    try:
        yield
    finally:
        nan_probe._codes.cache_clear()
        nan_probe._owners_of_codes.cache_clear()


@contextmanager
def _capturing() -> Iterator[list[str]]:
    """Let Dynamo capture, with all of its guards; yield the list that has its warnings afterwards."""
    import torch._dynamo as dynamo

    texts: list[str] = []
    told = set(dynamo.utils.warn_once_cache)
    dynamo.utils.warn_once_cache.clear()
    careful = dynamo.config.patch(
        allow_rnn=True,
        recompile_limit=2 * _MOST_GRAPHS,  # it would warn
        skip_nnmodule_hook_guards=False,
        suppress_errors=False,
        trace_numpy=False,
        use_numpy_random_stream=True,
    )
    try:
        stance = torch.compiler.set_stance("default")
        left = _marks_taken_off(), _environment_kept()
        with warnings.catch_warnings(record=True) as caught, careful, stance, left[0], left[1], catching_refused():
            warnings.simplefilter("always")
            yield texts
        texts += [str(warning.message) for warning in caught]
    finally:
        dynamo.utils.warn_once_cache.update(told)


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


def _in_one_line(error: Exception) -> str:
    """Return what an error says, in one line, and where in the user's code it comes from."""
    if isinstance(error, _NotRecordedError):
        return "Dynamo is switched off"
    error = getattr(error, "inner_exception", error)
    text = str(error)
    if type(error).__name__ in _BY_VALUES:
        return "where entries go depends on the values of tensors"
    if "convert all Tensors to FakeTensors" in text:
        return "to which samples the entries of a tensor belong is found out by trial, which takes values"
    own = f"{NotReplayableError.__name__}: "  # what Dynamo has wrapped into an error of its own
    name = "" if isinstance(error, NotReplayableError) or text.startswith(own) else f"{type(error).__name__}: "
    places = re.findall(r'File "([^"]+)", line (\d+)', text.partition("from user code")[2])
    place = f" ({Path(places[-1][0]).name}:{places[-1][1]})" if places else ""
    return (name + first_line(text.removeprefix(own))).rstrip(".") + place


_BY_VALUES = ("GuardOnDataDependentSymNode", "DataDependentOutputException", "DynamicOutputShapeException")
