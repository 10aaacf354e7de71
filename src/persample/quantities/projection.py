"""A few random numbers made of each gradient, which keep lengths and products (Johnson and Lindenstrauss, 1984)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from persample.errors import OptionError
from persample.quantities.block import Block, as_matrix
from persample.quantities.parts import ByGroup
from persample.quantities.protocol import Accumulation, Setting

_COORDINATES = 2**13  # of a parameter that share a seed, so that no more of the matrix needs to be there at once


@dataclass(frozen=True)
class Projection:
    """R g_i with a random matrix R of `size` rows, shape `(B, size)`: E (R g_i)·(R g_j) = g_i·g_j.

    The entries of R are normal, of variance 1 / `size`. They depend on the seed, on the name of the parameter and on
    the place in it, so projections are the same for every backend, device and batch, up to rounding.

    Attributes:
        size: k, how many numbers are made of each gradient.
        seed: of the matrix.

    Raises:
        OptionError: `size` is not a positive integer, or `seed` no integer.
    """

    size: int
    seed: int = 0
    name: str = "projection"

    def __post_init__(self) -> None:
        if type(self.size) is not int or self.size < 1:
            raise OptionError(f"size={self.size!r} must be a positive integer: how many numbers to make of a gradient.")
        if type(self.seed) is not int:
            raise OptionError(f"seed={self.seed!r} must be an integer.")

    def begin(self, setting: Setting) -> Accumulation[Tensor]:
        return _Projected(self, ByGroup(None, setting, setting.size, self.size))

    def matrix(self, name: str, numbers: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield Rᵀ for a parameter of so many numbers, `(n, size)` in float32, for n of them after the other."""
        for start in range(0, numbers, _COORDINATES):
            rows = min(_COORDINATES, numbers - start)
            digest = hashlib.sha256(f"{self.seed}/{name}/{start}".encode()).digest()
            generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            entries = torch.randn(_COORDINATES, self.size, generator=generator, dtype=torch.float32, device="cpu")
            yield slice(start, start + rows), entries[:rows] / self.size**0.5


class _Projected(Accumulation[Tensor]):
    def __init__(self, projection: Projection, sketch: ByGroup) -> None:
        self._projection, self._sketch = projection, sketch

    def add(self, block: Block) -> None:
        sketch = self._sketch.of(block.name)
        assert sketch is not None  # all parameters are together
        for where, g in block.pieces():
            rows = as_matrix(g)
            here = slice(block.start + where.start, block.start + where.stop)
            for entries, matrix in self._projection.matrix(block.name, rows.shape[1]):
                sketch[here] += (rows[:, entries] @ matrix.to(rows)).to(sketch)

    def result(self) -> Tensor:
        found = self._sketch.result()
        assert isinstance(found, Tensor)
        return found
