"""Which kernels of the optimizer's step there are, by name: each is compiled, and tried, by itself."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias


class Update(NamedTuple):
    """A kernel of updates: whether there is momentum, steps are clipped, and the divisor has the new curvature."""

    has_momentum: bool
    clips: bool
    order_updated: bool


StepKernel: TypeAlias = Update | Literal["draw"]
