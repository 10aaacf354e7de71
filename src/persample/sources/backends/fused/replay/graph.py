"""One call of a step, the graph of Dynamo's that serves it, and what was recorded of that graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from persample.sources.backends.fused.known_values import same_in_each_call
from persample.sources.backends.fused.replay.errors import NotReplayableError
from persample.sources.backends.fused.replay.flat_graph import flat_graph
from persample.sources.backends.fused.replay.ordinary import Ordinary
from persample.sources.backends.fused.replay.request import Request, taken_apart
from persample.sources.backends.fused.replay.runners import NotServedError, Run, Way, changes_nothing, runner
from persample.sources.batch import Batch

_MOST_WANTED = 8  # different results of one graph


class Call:
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
        self.graph: Graph | None = None
        self.losses = torch.empty(0)
        self.result: Any = None


class Graph:
    """A graph of Dynamo's, and what was recorded of it.

    It holds neither the model nor the step: Dynamo keeps it as long as the code of the step.

    Args:
        captured: forward pass and loss.
        examples: its operands.
        call: the one for which it was captured.

    Attributes:
        recordings: what was recorded, by what was wanted.
    """

    def __init__(self, captured: GraphModule, examples: Sequence[Tensor], call: Call) -> None:
        self.recordings: dict[Hashable, Recording] = {}
        self._captured: GraphModule | None = captured
        named, numbered = {id(p): n for n, p in call.parameters.items()}, {id(t): n for n, t in enumerate(call.tensors)}
        self._parameters = {i: named[id(t)] for i, t in enumerate(examples) if id(t) in named}
        self._tensors = {i: numbered[id(t)] for i, t in enumerate(examples) if id(t) in numbered}
        if any(t.requires_grad and i not in self._parameters for i, t in enumerate(examples)):
            raise NotReplayableError("a tensor that is no parameter of the model requires a gradient")
        self._others = [name for name in call.parameters if name not in self._parameters.values()]  # are not reached

    def empty(self) -> None:
        """Let go of all operations, as Dynamo does not let go of the graph."""
        self.recordings.clear()
        self._captured = None

    def operands(self, inputs: Sequence[Tensor], call: Call) -> list[Tensor]:
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

    def record(self, operands: Sequence[Tensor], call: Call) -> Recording:
        """Write down the operations of the step."""
        assert self._captured is not None
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

        constants = same_in_each_call(operands[:others], [*self._tensors, *names])
        recorded, looked_at = flat_graph(self._captured, operands, list(names), compute, constants)
        staying = [i for i in range(others) if i not in self._tensors]
        self.recordings[call.what.key] = Recording(
            recorded, form, ordinary_state, sharing(operands), staying, looked_at
        )
        return self.recordings[call.what.key]

    def _in_place_of(self, number: int, operands: Sequence[Tensor], tensor: Tensor) -> Tensor:
        """Return the operand for a tensor of the batch, or that itself if the graph does not take it."""
        return next((operands[i] for i, n in self._tensors.items() if n == number), tensor)


class Recording:
    """The operations of a step, and how they are run.

    Attributes:
        form: of the result, with places for the tensors.
        ordinary_state: whether the state that is left on the model is that of an ordinary forward pass.
        sharing: which operands share memory.
        looked_at: the values of operands that it goes by, by their number.
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
        looked_at: Mapping[int, Tensor],
    ) -> None:
        self.form, self.ordinary_state, self.sharing, self.looked_at = form, ordinary_state, sharing, looked_at
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


def sharing(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Return for each tensor the number of the first that shares its memory."""
    first: dict[int, int] = {}
    return tuple([first.setdefault(t.untyped_storage().data_ptr(), i) for i, t in enumerate(tensors)])
