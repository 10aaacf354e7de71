"""The uses of the parameters in one forward pass, and how their contributions become moments or rows.

A parameter that is used once is done as soon as the gradient δ of that use arrives in the backward pass; so is one of
which each use takes other entries, as experts take their slices of one tensor. All others wait until every use has its
δ: then their contributions are added up for each sample, a few samples at a time, and squared after that.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from persample.kernels.pieces import samples_at_once
from persample.quantities.block import Block
from persample.sources.backends.contribution_blocks import SeveralUses, SingleUse
from persample.sources.backends.contributions import Contribution
from persample.sources.backends.fused.expressions import Expression


class Moment:
    """Receives contributions and adds up Σ_i g_i and Σ_i g_i²."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.total: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.uses: dict[str, list[Expression]] = {}
        self.waiting: list[tuple[Expression, Contribution]] = []
        self._apart: dict[str, bool] = {}

    def expect(self, expression: Expression) -> None:
        for name in expression.parameters:
            self.uses.setdefault(name, []).append(expression)

    def receive(self, expression: Expression, contribution: Contribution) -> None:
        name = next(iter(expression.parameters))
        uses = self.uses.get(name, ())
        if len(uses) == 1 and expression.reorders:
            total, squares = contribution.sums()
            self.total[name] = expression.pull(total)[name]
            self.squares[name] = expression.pull(squares)[name]
        elif len(uses) > 1 and self._are_apart(name):
            for sums, value in zip((self.total, self.squares), contribution.sums(), strict=True):
                if name not in sums:
                    sums[name] = value.new_zeros(expression.parameters[name].shape)
                expression.entries(sums[name]).add_(value)
        else:
            self.waiting.append((expression, contribution))

    def _are_apart(self, name: str) -> bool:
        """Whether no entry of a parameter is used twice."""
        if name not in self._apart:
            spans = [expression.span for expression in self.uses[name]]
            known = sorted(span for span in spans if span is not None)
            apart = all(last < first for (_, last), (first, _) in pairwise(known))
            self._apart[name] = apart and len(known) == len(spans)
        return self._apart[name]

    def finish(self) -> None:
        if not self.waiting:
            return
        width = sum(expression.width for expression, _ in self.waiting)
        rows = samples_at_once(width, self.waiting[0][0].value.device)
        for start in range(0, self.batch_size, rows):
            g = added_up(self.waiting, slice(start, start + rows))
            for name, piece in g.items():
                _add(self.total, name, piece.sum(0))
                # Not in place: the gradients of two parameters may be one tensor, as those in a sum are.
                _add(self.squares, name, piece.square().sum(0))


class SingleGradients:
    """Receives contributions and adds up the gradient g_i of each sample."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def expect(self, expression: Expression) -> None:
        pass

    def receive(self, expression: Expression, contribution: Contribution) -> None:
        for name, g in added_up([(expression, contribution)], slice(None)).items():
            _add(self.gradients, name, g)

    def finish(self) -> None:
        pass


class Blocks:
    """Receives contributions and gives blocks of them on: those of single uses at once, the others in the end.

    Args:
        batch_size: B.
        give: takes the blocks.
    """

    def __init__(self, batch_size: int, give: Callable[[Block], None]) -> None:
        self.batch_size = batch_size
        self.give = give
        self.uses: dict[str, int] = {}
        self.waiting: list[tuple[Expression, Contribution]] = []

    def expect(self, expression: Expression) -> None:
        for name in expression.parameters:
            self.uses[name] = self.uses.get(name, 0) + 1

    def receive(self, expression: Expression, contribution: Contribution) -> None:
        name = expression.names[0]
        if expression.reorders and self.uses.get(name) == 1:
            width = expression.value.numel()
            self.give(SingleUse(name, 0, self.batch_size, contribution, expression, width))
        else:
            self.waiting.append((expression, contribution))

    def finish(self) -> None:
        parameters = {name: p for expression, _ in self.waiting for name, p in expression.parameters.items()}
        for name, p in parameters.items():
            uses = [(e, contribution) for e, contribution in self.waiting if name in e.parameters]
            width = sum(e.width for e, _ in uses)
            self.give(SeveralUses(name, 0, self.batch_size, uses, width, p.detach()))


def added_up(waiting: list[tuple[Expression, Contribution]], rows: slice) -> dict[str, Tensor]:
    """Return g_i of the samples in `rows`, added up over all contributions, for each parameter that has any."""
    g: dict[str, Tensor] = {}
    for expression, contribution in waiting:
        for name, piece in expression.pull_rows(contribution.take(rows).per_sample()).items():
            _add(g, name, piece)
    return g


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value
