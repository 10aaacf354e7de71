"""For `explain`: the forward pass under capture, recorded: each use of a parameter, and what would serve it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from persample.errors import PersampleError, UnsupportedModelError
from persample.sources.backends.contributions import Contribution
from persample.sources.backends.fused.accumulators import added_up
from persample.sources.backends.fused.arguments import tensors_in
from persample.sources.backends.fused.autograd_functions import Kernel
from persample.sources.backends.fused.capture import Capture
from persample.sources.backends.fused.carry import plain
from persample.sources.backends.fused.expressions import Expression
from persample.sources.backends.fused.op_table import name_of
from persample.sources.backends.fused.propagation.lost import Lost
from persample.sources.backends.fused.vjp import Mapped, MappedRows
from persample.sources.model.autograd_graph import nodes_behind
from persample.sources.model.refusals import VMAP_OR_VJP
from persample.sources.model.usage import Use
from persample.sources.selfcheck.oracle import REENTRANT


@dataclass(frozen=True)
class _Tapped:
    """An operation whose result has a tap.

    Attributes:
        names: the parameters that it uses.
        by: what it is called.
        module: the path of the module in which it is called.
    """

    names: tuple[str, ...]
    by: str
    module: str


class _Sink:
    """Keeps what it receives until the next operation."""

    def __init__(self) -> None:
        self.expected: list[Expression] = []
        self.received: list[tuple[Expression, Contribution]] = []

    def expect(self, expression: Expression) -> None:
        self.expected.append(expression)

    def receive(self, expression: Expression, contribution: Contribution) -> None:
        self.received.append((expression, contribution))


class UsageRecorder(Capture):
    """A capture that continues where an operation is refused, and needs no backward pass.

    Args:
        parameters: the parameters to follow, by name.
        batch_size: B.
        current_module: returns the path of the module whose forward pass is running.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], batch_size: int, current_module: Callable[[], str]
    ) -> None:
        self._sink = _Sink()
        super().__init__(parameters, batch_size, self._sink)
        self._parameters = parameters
        self._current_module = current_module
        self._running: list[str] = []
        self._refused: list[Use] = []
        self._taps: dict[Node, _Tapped] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._running.append(name_of(func))
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except UnsupportedModelError as refusal:
            arguments = (args, dict(kwargs or {}))
            expressions = [e for t in tensors_in(arguments) if (e := self.expression(t)) is not None]
            if not expressions:
                raise
            names = dict.fromkeys(name for expression in expressions for name in expression.names)
            self._refused += [Use(name, "refused", self._by(), self._current_module(), str(refusal)) for name in names]
            return plain(self, func, *self.values(arguments))
        finally:
            self._running.pop()

    def tap(self, result: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # The node of a tap at a view is inside of another one, where nobody can look.
        result = result.clone() if result._is_view() else result
        return self._noted(super().tap(result, *args, **kwargs))

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._noted(super().run(*args, **kwargs))

    def copies(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._noted(super().copies(*args, **kwargs))

    def mixed(self, result: Tensor, where: Lost, expressions: Sequence[Expression], refusal: PersampleError) -> Tensor:
        result = super().mixed(result, where, expressions, refusal)
        if result.grad_fn is not None:
            self._note(result.grad_fn, expressions)
        return result

    def uses(self, losses: Tensor) -> Iterator[Use]:
        """Yield the uses that the `losses` of this forward pass depend on.

        Raises:
            UnsupportedModelError: the model is refused as a whole.
        """
        yield from self._refused
        reached = nodes_behind(losses)
        if any("CheckpointFunction" in node.name() for node in reached):
            raise UnsupportedModelError(REENTRANT)
        kernels = {
            node: Kernel(self, node, results, taken)
            for node, results in self.kernels.items()
            if node in reached and (taken := self.taken(node))
        }
        self.kernels.clear()
        for node, tapped in self._taps.items():
            if node in reached:
                yield from self._tried(node, tapped)
        for kernel in kernels.values():
            used = {number for node in reached for following, number in node.next_functions if following is kernel.node}
            yield from self._tried_kernel(kernel, used)
        others = (node for node in reached if node not in kernels)
        unseen = {getattr(following, "variable", None) for node in others for following, _ in node.next_functions}
        for name, parameter in self._parameters.items():
            if parameter in unseen:
                yield Use(name, "refused", "an operation that is not seen", "", unseen_use(name))
        for leaf, expression in self.leaves().items():
            for name in expression.names if leaf in unseen else ():
                yield Use(name, "refused", "an operation that is not seen", "", unseen_use(name))

    def _noted(self, result: Tensor) -> Tensor:
        """Keep the node of `result`, whose operation has just told the sink its uses."""
        expected, self._sink.expected = self._sink.expected, []
        node = result.grad_fn
        while expected and node is not None and getattr(node, "trace", None) is not self:
            node = node.next_functions[0][0]  # of a view, that of its base
        if expected and node is not None:
            self._note(node, expected)
        return result

    def _note(self, node: Node, expressions: Sequence[Expression]) -> None:
        names = tuple(dict.fromkeys(name for expression in expressions for name in expression.names))
        self._taps[node] = _Tapped(names, self._by(), self._current_module())

    def _by(self) -> str:
        """The operation that the model calls, and the one inside it that is served, if different."""
        if not self._running:  # the losses are made of parameters and of what was not seen to be samples
            return "the losses"
        outer, inner = self._running[0], self._running[-1]
        return outer if inner == outer else f"{outer} → {inner}"

    def _tried(self, node: Node, tapped: _Tapped) -> Iterator[Use]:
        """Apply the rule of one operation to δ = 0 and the first sample."""
        self._sink.received = []
        output = node._input_metadata[0]
        delta = torch.zeros(output.shape, dtype=output.dtype, device=output.device)
        try:
            with self.during_backward():
                node.apply(delta)  # type: ignore[attr-defined]
            for received in self._sink.received:
                added_up([received], slice(0, 1))
        except UnsupportedModelError as refusal:
            yield from (Use(name, "refused", tapped.by, tapped.module, str(refusal)) for name in tapped.names)
            return
        for expression, contribution in self._sink.received:
            kind: Any = "fallback" if isinstance(contribution, Mapped | MappedRows) else "rule"
            yield from (Use(name, kind, tapped.by, tapped.module) for name in expression.names)

    def _tried_kernel(self, kernel: Kernel, used: Collection[int]) -> Iterator[Use]:
        """Apply the backward pass of a custom autograd function to some δ at its used results."""
        kernel.remove()
        names = dict.fromkeys(name for expression in kernel.expressions.values() for name in expression.names)
        by = kernel.node.name().removesuffix("Backward")
        try:
            results = enumerate(kernel.node._input_metadata)
            kernel.receive([_numbers(like) if number in used else None for number, like in results])
        except UnsupportedModelError as refusal:
            yield from (Use(name, "refused", by, "", str(refusal)) for name in names)
        else:
            yield from (Use(name, "fallback", by, "") for name in names)


def _numbers(like: Any) -> Tensor | None:
    """Return a gradient for a result of that shape, dtype and device, with distinct entries."""
    if not (like.dtype.is_floating_point or like.dtype.is_complex):
        return None
    return torch.linspace(1, 2, math.prod(like.shape), dtype=like.dtype, device=like.device).view(tuple(like.shape))


def unseen_use(name: str) -> str:
    """The refusal of a parameter that reaches the losses without being captured."""
    return (
        f"Parameter {name!r} is used by an operation that backend 'fused' cannot see (a custom "
        f"torch.autograd.Function, or compiled code): {VMAP_OR_VJP}."
    )
