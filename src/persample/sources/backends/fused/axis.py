"""The dimension of a tensor that holds the samples, perhaps folded with others, and how to unfold it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Axis(NamedTuple):
    """The samples are in dimension `dim` of a tensor, which has `before · B · after` entries there."""

    dim: int
    before: int = 1
    after: int = 1

    @property
    def folded(self) -> int:
        """The size of that dimension in a batch of one."""
        return self.before * self.after

    def sample_first(self, x: Tensor, batch: int) -> Tensor:
        """Return `x` as `(B, *shape in a batch of one)`."""
        parts: Tensor = x.unflatten(self.dim, (self.before, batch, self.after)).movedim(self.dim + 1, 0)
        return parts.flatten(self.dim + 1, self.dim + 2)

    def put_back(self, parts: Tensor) -> Tensor:
        """Undo `sample_first`."""
        folded: Tensor = parts.unflatten(self.dim + 1, (self.before, self.after)).movedim(0, self.dim + 1)
        return folded.flatten(self.dim, self.dim + 2)
