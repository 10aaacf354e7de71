"""Custom autograd functions that take samples and parameters, such as fused kernels.

Their forward pass was followed, so it is known where the samples are in their results. What autograd calls in the
backward pass is linear in the gradient δ of the results, so it gives the gradient g_i of a parameter from the part of δ
that belongs to sample i: one call for each sample, of this function alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from persample.errors import UnsupportedModelError
from persample.sources.backends.contributions import Terms, precise
from persample.sources.backends.fused.expressions import Expression
from persample.sources.backends.fused.layout import Layout
from persample.sources.backends.fused.taps import Copies, Mixed, Operation, Tap
from persample.sources.backends.fused.trace import Trace
from persample.sources.selfcheck.tolerances import tolerance

_OWN = tuple(function._backward_cls for function in (Tap, Operation, Copies, Mixed))

Results = dict[int, Layout]


def is_kernel(node: Any) -> bool:
    """Whether a node of autograd's graph belongs to a custom function that is not ours."""
    return isinstance(node, BackwardCFunction) and not isinstance(node, _OWN)


class Kernel:
    """Computes the contributions of a custom function's parameters when its backward pass runs.

    Args:
        trace: receives them.
        node: that of the function in autograd's graph.
        results: where the samples are in its results, by their number.
        expressions: those of the parameters that it took, by the number of the edge that leads to them.
    """

    def __init__(self, trace: Trace, node: Any, results: Results, expressions: Mapping[int, Expression]) -> None:
        self.trace, self.node, self.results, self.expressions = trace, node, results, expressions
        self._handles = [node.register_prehook(self.receive), node.register_hook(self._withheld)]

    def remove(self) -> None:
        """Remove the hooks from the function's backward pass."""
        for handle in self._handles:
            handle.remove()

    def _withheld(self, gradients: tuple[Any, ...], _: Any) -> tuple[Any, ...]:
        """Return the gradients by samples only: a gradient that still reaches a parameter came from an unseen use."""
        return tuple(None if number in self.expressions else g for number, g in enumerate(gradients))

    def receive(self, deltas: Sequence[Any]) -> None:
        """Give the capture the contributions from the gradients of the results.

        Raises:
            UnsupportedModelError: the function mixes the samples, or nobody saw where they are in a result.
        """
        node = self.node
        with torch.no_grad(), torch._C.DisableTorchFunction():
            given = [
                torch.zeros(like.shape, dtype=like.dtype, device=like.device) if d is None else d
                for d, like in zip(deltas, node._input_metadata, strict=True)
            ]
            labels = [0 if d is None else self._labels(number, d) for number, d in enumerate(deltas)]
            alone = [
                self._gradients(
                    node,
                    [
                        torch.where(torch.as_tensor(o == i, device=d.device), d, 0)
                        for d, o in zip(given, labels, strict=True)
                    ],
                )
                for i in range(self.trace.batch_size)
            ]
            together = self._gradients(node, given)
            for number, total in together.items():
                rows = [g.get(number) for g in alone]
                if any(row is None for row in rows):
                    raise self._refusal("returns other gradients for the batch than for its samples")
                stacked = torch.stack([row for row in rows if row is not None])
                summed, allowed = stacked.sum(0), tolerance(total)
                largest = float(stacked.abs().sum(0).nan_to_num().max()) if total.numel() else 0.0  # they may cancel
                if not torch.allclose(summed, total, allowed, allowed * largest, equal_nan=True):
                    raise self._refusal(
                        "has a backward pass that is not linear in the gradients of its results, so it mixes the "
                        "samples"
                    )
                if number in self.expressions:
                    self.trace.receive(self.expressions[number], Terms(precise(stacked).unsqueeze(1)))

    def _labels(self, number: int, delta: Tensor) -> Any:
        if number not in self.results:
            raise self._refusal("has a result whose samples cannot be told apart")
        return self.results[number].labels(delta.shape, delta.device)

    def _gradients(self, node: Any, deltas: list[Any]) -> dict[int, Tensor]:
        """Return the results of the function's backward pass, by the edges that they go to."""
        found = node.apply(*deltas)
        found = found if isinstance(found, tuple) else (found,)
        wanted = [g for g, needed in zip(found, node.needs_input_grad, strict=False) if needed]
        edges = [number for number, (following, _) in enumerate(node.next_functions) if following is not None]
        return {number: g for number, g in zip(edges, wanted, strict=True) if isinstance(g, Tensor)}

    def _refusal(self, reason: str) -> UnsupportedModelError:
        names = [name for expression in self.expressions.values() for name in expression.names]
        return UnsupportedModelError(
            f"A custom torch.autograd.Function that uses parameter {', '.join(map(repr, names))} {reason}: use "
            "backend 'loop'."
        )
