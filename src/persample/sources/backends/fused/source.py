"""The project's own engine: mean gradient and exact second moment inside one ordinary backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from persample.dtypes import without_autocast
from persample.errors import OptionError, UnsupportedModelError
from persample.kernels.autotune import deterministic_choice
from persample.moments import Moments
from persample.quantities.protocol import Quantity
from persample.sources.backends.fused.accumulators import Blocks, Moment, SingleGradients
from persample.sources.backends.fused.arguments import memory_of
from persample.sources.backends.fused.capture import Capture
from persample.sources.backends.fused.malloc import keep_freed_memory
from persample.sources.backends.fused.recorder import FusedRecorder
from persample.sources.backends.fused.replay import request
from persample.sources.backends.fused.replay.errors import NotReplayableError
from persample.sources.backends.fused.replay.replay import Replay
from persample.sources.backends.fused.replay.request import Request
from persample.sources.backends.fused.torch_function_bypass import opened
from persample.sources.backends.fused.usage_recorder import UsageRecorder, unseen_use
from persample.sources.batch import Batch
from persample.sources.contract import Check, Read, Receive
from persample.sources.model.autograd_graph import nodes_behind, variables_of
from persample.sources.model.usage import Use, current_module
from persample.sources.recording.results import LossReduction, Wanted
from persample.sources.selfcheck.oracle import gradient, other_leaves, reentrant_refused, refuse_accumulated
from persample.sources.source import PerSampleGradSource

# The mode is active meanwhile, but this call is not the model's.
_grad = opened(torch.autograd.grad) or torch.autograd.grad


class FusedSource(PerSampleGradSource):
    """Per-sample gradients by capturing the operations that use parameters.

    Args:
        model: the network.
        loss_fn: the loss of each sample.
        deterministic: fix the form of each product by its shape, so that results repeat bit for bit, in other
            processes too; otherwise the fastest is found by timing each once for each shape.
            `torch.use_deterministic_algorithms(True)` does the same.
        compile: with `"auto"` the step of `moments` or `compute` is recorded by `torch.compile` when a kind of batch
            has come for a while, and replayed later on, the same operations with the same numbers; with `True`, at the
            first batch of its kind; with `False`, never. What cannot be recorded, or gives other numbers, goes the
            ordinary way, and `ran_because` says why. With `"inductor"` PyTorch's compiler makes kernels of the recorded
            step; with `"cuda-graph"` it becomes a CUDA graph, if all of it runs on one GPU.
        check: when the self-check runs, see `PerSampleGradSource`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Any],
        *,
        deterministic: bool = False,
        compile: bool | Literal["auto", "inductor", "cuda-graph"] = "auto",
        check: Check = "first",
    ) -> None:
        super().__init__(model, loss_fn, check=check)
        keep_freed_memory()
        self.deterministic = deterministic
        self.compile = compile
        self.replay = _replay(compile)

    def compute_per_sample(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if batch.size == 1:
            losses, alone = self._of_one(batch)
            return losses, {name: g.unsqueeze(0) for name, g in alone.items()}
        parameters, sink = self.parameters(), SingleGradients()
        losses = self._backward(batch, parameters, sink)
        return losses, _in_own_memory(_complete(parameters, sink.gradients, batch.size))

    def compute_moments(self, batch: Batch) -> Moments:
        if batch.size == 1:
            losses, alone = self._of_one(batch)
            return Moments(losses, alone, {name: g.square() for name, g in alone.items()})
        if self.replay is None:
            return self.ordinary_moments(batch)
        found: Moments = self._by_replay(self.replay, batch, request.moments(FusedSource.ordinary_moments))
        return found

    def compute_quantities(self, batch: Batch, asked: Sequence[Quantity[Any]], read: Read) -> tuple[Tensor, list[Any]]:
        if self.replay is None or batch.size == 1:
            return read(self, batch, asked)
        try:
            what = request.quantities(asked, read)
        except request.ChangingError as reason:
            self.replay.leave(str(reason))
            self._note(self.replay)
            return read(self, batch, asked)
        losses, results = self._by_replay(self.replay, batch, what)
        return losses, results

    def _by_replay(self, replay: Replay, batch: Batch, what: Request) -> Any:
        found = replay.run(self, batch, what)
        self._note(replay)
        return found

    def _note(self, replay: Replay) -> None:
        eager = "eager" if replay.reason else None  # that is, if one could have been recorded by now
        self.ran = eager if replay.ran is None else "replayed" if replay.ran == "operations" else replay.ran
        self.ran_because = replay.reason

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

        Raises:
            NotReplayableError: not everything that the step does can be recorded.
        """
        source = _Recorded(self, losses, parameters)
        return what.compute(source, batch, own), source.ordinary_state

    def ordinary_moments(self, batch: Batch) -> Moments:
        """Return the moments of several samples, computed operation by operation."""
        parameters, sink = self.parameters(), Moment(batch.size)
        losses = self._backward(batch, parameters, sink)
        if sink.total:
            torch._foreach_div_([*sink.total.values(), *sink.squares.values()], batch.size)
        return Moments(losses, _complete(parameters, sink.total), _complete(parameters, sink.squares))

    def compute_blocks(self, batch: Batch, receive: Receive, max_bytes: int) -> Tensor:
        if batch.size == 1:
            return super().compute_blocks(batch, receive, max_bytes)
        return self._backward(batch, self.parameters(), Blocks(batch.size, receive))

    def samples_at_once(self, batch: Batch, max_bytes: int) -> int:
        return batch.size

    def reading_blocks(self) -> AbstractContextManager[None]:
        return deterministic_choice(self.deterministic)

    def recorder(self, loss_reduction: LossReduction, wanted: Wanted) -> FusedRecorder:
        return FusedRecorder(self, loss_reduction, wanted)

    def _of_one(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient of a single sample is the ordinary one."""
        losses = self.losses(batch)
        return losses.detach(), _in_own_memory(gradient(losses.sum(), self))

    def find_uses(self, batch: Batch | None) -> Iterable[Use]:
        if batch is None:
            return [Use(name, "rule", "the operations that use it", "") for name in self.parameters()]
        if batch.size == 1:
            reached = variables_of(nodes_behind(self.losses(batch)))
            return [
                Use(name, "rule", "the ordinary gradient of a single sample", "")
                for name, p in self.parameters().items()
                if p in reached
            ]
        with current_module(self.model) as module, deterministic_choice(True):
            recorder = UsageRecorder(self.parameters(), batch.size, module)
            losses = self._forward(batch, recorder)
            uses = list(recorder.uses(losses))
        if self.replay is not None and not self.replay.by_itself and all(use.kind != "refused" for use in uses):
            self._by_replay(self.replay, batch, request.moments(FusedSource.ordinary_moments))
        return uses

    def _forward(self, batch: Batch, capture: Capture) -> Tensor:
        """Return the losses of a forward pass under capture."""
        capture.follow(batch)
        with capture:
            losses = self.losses(batch)
        return capture.finish(losses)

    def _backward(
        self, batch: Batch, parameters: dict[str, nn.Parameter], sink: Moment | SingleGradients | Blocks
    ) -> Tensor:
        capture = Capture(parameters, batch.size, sink)
        with deterministic_choice(self.deterministic):
            losses = self._forward(batch, capture)
            if losses.requires_grad:
                total = losses.sum()
                with capture.during_backward([total]):
                    self._run_backward(total, capture, parameters)
            with without_autocast(losses.device):
                sink.finish()
            if capture.without_gradient:
                refuse_accumulated(parameters)
        self._done(capture)
        return losses.detach()

    def _done(self, capture: Capture) -> None:
        self.ordinary_state = not capture.rounds_otherwise

    def _run_backward(self, total: Tensor, capture: Capture, parameters: dict[str, nn.Parameter]) -> None:
        # The anchor makes every tap part of the graph; parameters are among the inputs so that an unseen use shows.
        derived = capture.leaves()
        inputs = [capture.anchor, *parameters.values(), *derived]
        if capture.without_gradient:
            inputs += other_leaves(total, inputs)
        with reentrant_refused(), _failed_repetition_refused():
            _, *unseen = _grad(total, inputs, allow_unused=True)
        if capture.without_gradient:
            refuse_accumulated(parameters)
        names = [*parameters, *(expression.names[0] for expression in derived.values())]
        for name, part in zip(names, unseen, strict=False):
            if part is not None:
                raise UnsupportedModelError(unseen_use(name))


class _Recorded(FusedSource):
    """The source while a step is recorded: all is computed as ever, but something else runs model and loss."""

    def __init__(self, source: FusedSource, losses: Callable[[], Tensor], parameters: dict[str, Any]) -> None:
        vars(self).update(vars(source), replay=None)
        self._losses, self._parameters = losses, parameters

    def parameters(self) -> dict[str, nn.Parameter]:
        return self._parameters

    def losses(self, batch: Batch, model: Callable[..., Any] | None = None) -> Tensor:
        losses = self._losses()
        if losses.shape != (batch.size,):
            raise NotReplayableError("the losses are no vector of length B")
        return losses

    def _done(self, capture: Capture) -> None:
        super()._done(capture)
        if capture.intercepted or capture.without_gradient:
            raise NotReplayableError("the model uses parameters where autograd does not look")


def _replay(compile: object) -> Replay | None:
    """Return what records steps, and None if none is to be recorded.

    Raises:
        OptionError: `compile` is none of its values.
    """
    made: dict[object, Callable[[], Replay | None]] = {
        False: lambda: None,
        True: lambda: Replay("operations"),
        "auto": lambda: Replay("operations", by_itself=True),
        "inductor": lambda: Replay("inductor"),
        "cuda-graph": lambda: Replay("cuda-graph"),
    }
    if not isinstance(compile, bool | str) or compile not in made:
        raise OptionError(f"compile={compile!r} is not known: use one of {', '.join(map(repr, made))}.")
    return made[compile]()


@contextmanager
def _failed_repetition_refused() -> Iterator[None]:
    """Add advice to the error if activation checkpointing did not repeat the same operations."""
    try:
        yield
    except CheckpointError as error:
        raise UnsupportedModelError(
            "Activation checkpointing did not repeat the same operations in the backward pass: do not pass "
            "parameters as arguments to a nested checkpoint (use them inside), do not change saved tensors by hooks, "
            f"or use backend 'vjp'. {str(error).splitlines()[0]}"
        ) from error


def _complete(parameters: dict[str, nn.Parameter], found: dict[str, Tensor], *leading: int) -> dict[str, Tensor]:
    """Return what was found in each parameter's dtype, and zeros for those that the batch does not reach."""
    complete = {}
    for name, p in parameters.items():
        value = found.get(name)
        if value is None:
            value = p.new_zeros((*leading, *p.shape))
        complete[name] = value if value.dtype == p.dtype else value.to(p.dtype)
    return complete


def _in_own_memory(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace tensors that share memory by copies; autograd gives the operands of a sum the same tensor."""
    separate, taken = {}, set()
    for name, g in gradients.items():
        memory = memory_of(g)
        shared = memory in taken or g.untyped_storage().nbytes() < g.numel() * g.element_size()
        taken.add(memory)
        separate[name] = g.clone(memory_format=torch.contiguous_format) if shared else g
    return separate
