"""A step: forward pass and loss of one model in one state of its attributes, recorded and replayed."""

from __future__ import annotations

import weakref
from abc import get_cache_token
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from persample.kernels.autotune import deterministic_choice
from persample.losses import require_losses
from persample.sources.backends.fused.replay.dynamo import MOST_GRAPHS, capturing, prepare, renewed
from persample.sources.backends.fused.replay.errors import (
    FailedError,
    NotRecordedError,
    NotReplayableError,
    RecordedError,
    in_one_line,
)
from persample.sources.backends.fused.replay.graph import Call, Graph, sharing
from persample.sources.backends.fused.replay.guards import guard_identities, see_unguarded
from persample.sources.backends.fused.replay.namespaces import Namespaces
from persample.sources.backends.fused.replay.ordinary import Ordinary
from persample.sources.backends.fused.replay.refusals import refuse_graph
from persample.sources.backends.fused.replay.request import Request, put_together
from persample.sources.backends.fused.replay.runners import Way
from persample.sources.backends.fused.replay.same_numbers import why_other_numbers
from persample.sources.batch import Batch
from persample.sources.model.held import Held
from persample.sources.model.modules import modules_of
from persample.sources.model.random_state import random_state, same_random_state, set_random_state
from persample.sources.model.recurrent_layers import repeatable

IN_VAIN = "what was recorded has served no later call"

_MOST_CLOSED = 64  # results that are known not to be recorded


class Step:
    """Forward pass and loss of one model in one state of its attributes, compiled.

    Dynamo's guards have gaps: a key that a dict lacks, the order of an `OrderedDict`, a method that a class of
    PyTorch's has got anew. So all that modules hold must be what it was, by identity, and so must be the methods of
    their classes and of those of other objects that Dynamo has met.

    Attributes:
        ran: how it was run at last; None if in the ordinary way.
        ran_because: why not in the way that was asked for.
        was_recorded: whether it was recorded then, or at least tried to be.
        call: the one that is being served.
        graphs: those that Dynamo has captured.
        held: what the modules hold.
        names: what the classes of modules, and other classes and modules that Dynamo has met, define.
    """

    def __init__(self, source: Ordinary, way: Way) -> None:
        self.ran: Way | None = None
        self.ran_because = ""
        self.was_recorded = False
        self.call: Call | None = None
        self.graphs: list[Graph] = []
        self._way, self._deterministic = way, source.deterministic
        self._served: set[Hashable] = set()  # what has been recorded, for a kind of batch at least
        self._closed: dict[Hashable, str] = {}  # why it is not recorded for further kinds
        prepare()
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
                    return self._replayed(self._compiled, Call(source, batch, what))
            except NotRecordedError:
                pass
            except (NotReplayableError, FailedError) as error:  # before anything was run, or changed
                self.ran_because = str(error)
        if not may_record:
            self.ran_because = self.ran_because or IN_VAIN
        return None if self.ran_because else self._recorded(source, batch, what)

    def _replayed(self, compiled: Callable[..., Any], call: Call) -> Any:
        self.call = call
        try:
            with repeatable(call.source.model):
                compiled(*call.arguments)
        except RecordedError:
            pass
        finally:
            self.call = None
        require_losses(call.losses, call.batch.size)
        return call.result

    def run(self, graph: Graph, inputs: Sequence[Tensor]) -> tuple[Tensor]:
        """Run one of the graphs; Dynamo's code calls it.

        Raises:
            NotRecordedError: it is not recorded, and may not be now.
            RecordedError: it has been recorded and run for the first time.
            NotReplayableError: it cannot be, or its operands are not those that it was recorded for.
        """
        call = self.call
        assert call is not None
        call.graph = graph
        operands, recording = graph.operands(inputs, call), graph.recordings.get(call.what.key)
        if recording is None:
            if not call.may_record:
                raise NotRecordedError
            recording = graph.record(operands, call)
        elif sharing(operands) != recording.sharing:
            raise NotReplayableError(
                "tensors share memory that did not when the step was recorded, or the other way round"
            )
        elif not all(torch.equal(operands[i], value) for i, value in recording.looked_at.items()):
            raise NotReplayableError("entries of a buffer of positions have changed since the step was recorded")
        with torch.no_grad(), torch._C._DisableAutocast(), deterministic_choice(self._deterministic):
            if recording.run is None:
                recording.make_ready(self._way, operands)
            try:
                losses, *results = recording.run(*operands)  # type: ignore[misc]
            except RuntimeError as error:
                if call.may_record or not recording.is_repeatable:
                    raise
                raise FailedError(f"it failed ({in_one_line(error)})") from error
        call.losses, call.result = losses, put_together(recording.form, results)
        call.source.ordinary_state = recording.ordinary_state
        self.ran, self.ran_because = recording.way, recording.because
        if call.may_record:
            raise RecordedError
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

        def begin_again() -> None:
            state.put_back()
            set_random_state(start)

        def again() -> Any:
            begin_again()
            return what.compute(source, batch, what.tensors)

        reason, call = "", Call(source, batch, what, may_record=True)
        begin_again()
        try:
            with capturing() as warned:
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
                reason = why_other_numbers(self.ran, result, replayed, again, [*source.parameters().values()])
        except Exception as error:  # noqa: BLE001 - whatever Dynamo or a tensor without values cannot do: a reason
            reason = in_one_line(error)
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

    def _close(self, what: Request, reason: str) -> None:
        """Let what is wanted go the ordinary way from now on, but for kinds of batches that have been recorded."""
        if len(self._closed) >= _MOST_CLOSED:
            self._closed.clear()
        self._closed[what.key] = self.ran_because = reason
        self.ran = None


def _key(source: Ordinary) -> tuple[Any, ...]:
    """Return what decides how a step runs, besides the attributes of the model."""
    return (
        *(id(source.model), id(source.loss_fn), source.deterministic, get_cache_token()),
        *[mode.device for mode in _get_current_function_mode_stack() if isinstance(mode, DeviceContext)],
        *[torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda")],
        *dict.fromkeys(map(type, modules_of(source.model))),
    )


def _compiled(model: nn.Module, loss_fn: Callable[[Any, Any], Any], step: Step) -> Callable[..., Any]:
    """Return the losses of a batch as a function that Dynamo captures for a step."""
    reference = weakref.ref(step)

    def losses_of_batch(args: tuple[Any, ...], kwargs: Mapping[str, Any], targets: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            raise NotRecordedError
        return loss_fn(model(*args, **kwargs), targets)

    def asking() -> Step:
        found = reference()
        if found is None:
            raise NotReplayableError("its source is gone")
        return found

    def backend(captured: GraphModule, examples: list[Any]) -> Callable[..., tuple[Tensor]]:
        step = asking()
        refuse_graph(captured, examples)
        if len(step.graphs) >= MOST_GRAPHS:
            raise NotReplayableError(f"Dynamo has captured it {MOST_GRAPHS} times")
        assert step.call is not None
        source, given = step.call.source, ("args", "kwargs", "targets")
        known = {"model": source.model, "loss_fn": source.loss_fn}
        scope = {"L": known | dict(zip(given, step.call.arguments, strict=True)), "G": own_globals}
        see_unguarded(scope, given, step.held.ids(), step.names)
        guard_identities(given)
        graph = Graph(captured, examples, step.call)
        step.graphs.append(graph)
        return lambda *inputs: asking().run(graph, inputs)

    own = renewed(losses_of_batch)  # type: ignore[arg-type]
    own_globals = own.__globals__
    # Dynamo never lets go of its guards, they hold the globals, and those the graphs.
    weakref.finalize(step, _empty, step.graphs).atexit = False
    compiled: Callable[..., Any] = torch.compile(own, backend=backend, fullgraph=True, dynamic=False)
    return compiled


def _empty(graphs: list[Graph]) -> None:
    for graph in graphs:
        graph.empty()
