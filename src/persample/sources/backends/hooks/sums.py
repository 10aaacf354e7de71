"""Summing contributions: Σ_i g_i and Σ_i g_i² over a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from persample.quantities.block import Block
from persample.sources.backends.contribution_blocks import Itself, Origin, SeveralUses, SingleUse
from persample.sources.backends.contributions import Contribution
from persample.sources.backends.hooks.printed import printed_second_moment


class HookSums:
    """Receives the contributions of all uses of the parameters in one backward pass.

    Args:
        parameters: by name.
        exact: whether all uses of a parameter are added up for each sample before they are squared; otherwise the
            formula printed in the paper is used.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, exact: bool) -> None:
        self.exact = exact
        self.total = {name: zeros(p) for name, p in parameters.items()}
        self.squares = {name: zeros(p) for name, p in parameters.items()}
        self._shared: dict[str, Tensor] = {}

    def receive(self, name: str, contribution: Contribution, uses: int) -> None:
        """Add a contribution to a parameter that is used `uses` times."""
        if not self.exact:
            self.total[name] += contribution.sums()[0]
            self.squares[name] += printed_second_moment(contribution)
        elif uses == 1:
            self.total[name], self.squares[name] = contribution.sums()
        else:
            self._shared[name] = self._shared.get(name, 0) + contribution.per_sample()

    def finish(self) -> None:
        """Square the sums over several uses."""
        for name, g in self._shared.items():
            self.total[name], self.squares[name] = g.sum(0), g.square().sum(0)
        self._shared.clear()


class HookBlocks:
    """Receives the contributions of all uses, and passes them on as blocks.

    Args:
        parameters: by name.
        batch_size: B.
        give: takes the blocks.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], batch_size: int, give: Callable[[Block], None]) -> None:
        self._parameters = parameters
        self._size = batch_size
        self._give = give
        self._shared: dict[str, list[tuple[Origin, Contribution]]] = {}

    def receive(self, name: str, contribution: Contribution, uses: int) -> None:
        """Pass on a block, or keep the contribution until all `uses` of the parameter have contributed."""
        width = self._parameters[name].numel()
        if uses == 1:
            self._give(SingleUse(name, 0, self._size, contribution, Itself(name), width))
        else:
            self._shared.setdefault(name, []).append((Itself(name), contribution))

    def finish(self) -> None:
        """Pass on the blocks that had to be kept."""
        for name, uses in self._shared.items():
            p = self._parameters[name]
            self._give(SeveralUses(name, 0, self._size, uses, 2 * p.numel(), p.detach()))
        self._shared.clear()


def zeros(parameter: Tensor, *leading: int) -> Tensor:
    """Return zeros of the parameter's shape behind `leading` dimensions, in at least float32."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros((*leading, *parameter.shape), dtype=dtype, device=parameter.device)
