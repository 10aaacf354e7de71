"""The uses of the parameters in one forward pass, and how their contributions become moments or rows.

A parameter that is used once is done as soon as the gradient δ of that use arrives in the backward pass. All others
wait until every use has its δ: then their contributions are added up for each sample, a few samples at a time, and
squared after that.
"""

from __future__ import annotations

from torch import Tensor

from persample.sources.backends.contributions import Contribution, samples_at_once
from persample.sources.backends.fused.expressions import Expression


class Moment:
    """Receives contributions and adds up Σ_i g_i and Σ_i g_i²."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.total: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.uses: dict[str, int] = {}
        self.waiting: list[tuple[Expression, Contribution]] = []

    def expect(self, expression: Expression) -> None:
        for name in expression.parameters:
            self.uses[name] = self.uses.get(name, 0) + 1

    def receive(self, expression: Expression, contribution: Contribution) -> None:
        name = next(iter(expression.parameters))
        if expression.reorders and self.uses.get(name) == 1:
            total, squares = contribution.sums()
            self.total[name] = expression.pull(total)[name]
            self.squares[name] = expression.pull(squares)[name]
        else:
            self.waiting.append((expression, contribution))

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


class PerSample:
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


def added_up(waiting: list[tuple[Expression, Contribution]], rows: slice) -> dict[str, Tensor]:
    """Return g_i of the samples in `rows`, added up over all contributions, for each parameter that has any."""
    g: dict[str, Tensor] = {}
    for expression, contribution in waiting:
        for name, piece in expression.pull_rows(contribution.take(rows).per_sample()).items():
            _add(g, name, piece)
    return g


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value
