"""How the recorded operations of a step are run: one after the other, compiled by Inductor, or as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from persample.sources.backends.fused.replay.errors import first_line

#: Runs a recorded step on its operands, and returns what it returns.
Run = Callable[..., Sequence[Tensor]]

Way = Literal["operations", "inductor", "cuda-graph"]

_WARM_UPS = 2
_MOST_FOR_INDUCTOR = 1500  # operations


class NotServedError(Exception):
    """A way that cannot serve a step."""


def runner(way: Way, recorded: GraphModule, operands: Sequence[Tensor], kept: Sequence[int]) -> Run:
    """Return what runs `recorded`.

    Args:
        way: how.
        recorded: the operations.
        operands: what they are recorded for.
        kept: the numbers of those operands that stay where they are in memory, as parameters do.

    Raises:
        NotServedError: it does not work in this way.
    """
    if way == "cuda-graph":
        return CudaGraph(recorded, operands, kept)
    return recorded.forward if way == "operations" else by_inductor(recorded, operands)


def by_inductor(recorded: GraphModule, operands: Sequence[Tensor]) -> Run:
    """Return the operations compiled by Inductor, with the random numbers that PyTorch draws.

    Raises:
        NotServedError: there are too many, or Inductor fails, as it does without a C++ compiler.
    """
    number = sum(node.op == "call_function" for node in recorded.graph.nodes)
    if number > _MOST_FOR_INDUCTOR:
        raise NotServedError(f"its {number} operations would take Inductor minutes; at most {_MOST_FOR_INDUCTOR}")
    from torch._inductor.compile_fx import compile_fx

    try:
        compiled: Any = compile_fx(recorded, [t.detach() for t in operands], config_patches={"fallback_random": True})
    except Exception as error:
        raise NotServedError(f"Inductor failed ({type(error).__name__}: {first_line(str(error))})") from error
    run: Run = compiled
    return run


class CudaGraph:
    """The operations as a CUDA graph, which works on memory of its own.

    Operands are copied in before each run, except for those that stay where they are; what the operations have written
    into operands is copied back, and results are copied out.

    Args:
        recorded: the operations.
        operands: what they are recorded for.
        kept: the numbers of the operands that stay where they are.

    Raises:
        NotServedError: a part of the step does not run on one GPU, or an operation cannot be captured.
    """

    def __init__(self, recorded: GraphModule, operands: Sequence[Tensor], kept: Sequence[int]) -> None:
        self._run = recorded.forward
        self._device = _gpu_of(recorded, operands)
        self._written = sorted(_written(recorded))
        _refuse_shared(operands, self._written)
        self._kept = [i for i in kept if i not in self._written]
        self._capture(operands)

    def __call__(self, *operands: Tensor) -> list[Tensor]:
        if any(operands[i].data_ptr() != self._own[i].data_ptr() for i in self._kept):
            self._kept = []  # the parameters move about: from now on they are copied in, too
            self._capture(operands)
        with torch.cuda.device(self._device):
            torch.cuda.current_stream().wait_event(self._done)
            _copy([self._own[i] for i in self._copied], [operands[i] for i in self._copied])
            self._graph.replay()
            _copy([operands[i] for i in self._written], [self._own[i] for i in self._written])
            results = [torch.empty_like(result) for result in self._results]
            _copy(results, self._results)
            self._done.record()
        return results

    def _capture(self, operands: Sequence[Tensor]) -> None:
        """Capture the graph; the numbers of operands and of random number generators stay what they are."""
        self._copied = [i for i in range(len(operands)) if i not in self._kept]
        self._own = [t.detach() if i in self._kept else _like(t) for i, t in enumerate(operands)]
        self._graph, self._done = torch.cuda.CUDAGraph(), torch.cuda.Event()
        drawn = torch.cuda.get_rng_state(self._device)
        try:
            with torch.cuda.device(self._device):
                beside = torch.cuda.Stream()
                beside.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(beside):  # forms of products are chosen here, which needs real values
                    for _ in range(_WARM_UPS):
                        _copy([self._own[i] for i in self._copied], [operands[i] for i in self._copied])
                        self._run(*self._own)
                torch.cuda.current_stream().wait_stream(beside)
                with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                    self._results = list(self._run(*self._own))
                self._done.record()
        except RuntimeError as error:
            raise NotServedError(f"it cannot be captured in a CUDA graph ({first_line(str(error))})") from error
        finally:
            torch.cuda.set_rng_state(drawn, self._device)


def _gpu_of(recorded: GraphModule, operands: Sequence[Tensor]) -> torch.device:
    """Return the GPU on which all of the step runs.

    Raises:
        NotServedError: there is none.
    """
    values = [node.meta.get("val") for node in recorded.graph.nodes if node.op in ("placeholder", "call_function")]
    devices = {t.device for t in (*tree_leaves(values), *operands) if isinstance(t, Tensor)}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        raise NotServedError(
            f"a CUDA graph needs one GPU for all of the step, which runs on {', '.join(sorted(map(str, devices)))}"
        )
    return next(iter(devices))


def changes_nothing(recorded: GraphModule) -> bool:
    """Whether the operations write into no operand and draw no random numbers."""
    tags = set().union(*[getattr(node.target, "tags", ()) for node in recorded.graph.nodes])
    return torch.Tag.nondeterministic_seeded not in tags and not _written(recorded)


def _written(recorded: GraphModule) -> set[int]:
    """Return the numbers of the operands into which operations may write, through a view of them, too."""
    behind: dict[Node, set[int]] = {}  # the operands with which the result of an operation may share memory
    written: set[int] = set()
    for node in recorded.graph.nodes:
        if node.op == "placeholder":
            behind[node] = {len(behind)}
            continue
        if node.op != "call_function":
            continue
        schema = getattr(node.target, "_schema", None)
        if schema is None:  # takes one of several results
            behind[node] = set().union(*[behind.get(n, set()) for n in node.all_input_nodes])
            continue
        given = {**dict(zip([a.name for a in schema.arguments], node.args, strict=False)), **node.kwargs}
        behind[node] = set()
        for argument in schema.arguments:
            if argument.alias_info is not None:
                shared = [n for n in tree_leaves(given.get(argument.name)) if isinstance(n, Node)]
                behind[node].update(*[behind.get(n, set()) for n in shared])
                if argument.alias_info.is_write:
                    written.update(*[behind.get(n, set()) for n in shared])
    return written


def _refuse_shared(operands: Sequence[Tensor], written: Sequence[int]) -> None:
    """Raise `NotServedError` if something is written into memory that two operands share."""
    memories = [t.untyped_storage().data_ptr() for t in operands]
    if any(memories.count(memories[i]) > 1 for i in written):
        raise NotServedError("the step writes into memory that several tensors share")


def _like(tensor: Tensor) -> Tensor:
    """Return memory for a tensor of the same strides."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _copy(to: list[Tensor], of: list[Tensor]) -> None:
    if to:
        torch._foreach_copy_(to, of)
