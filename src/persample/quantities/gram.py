"""The products of the gradients with each other, or with those of a second batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from persample.errors import OptionError
from persample.quantities.block import Block
from persample.quantities.parts import ByGroup, Per
from persample.quantities.protocol import Accumulation, Setting


@dataclass(frozen=True)
class Gram:
    """G Gᵀ, with the entries g_i·g_j, shape `(B, B)`; or G Hᵀ, with the gradients h_j of a second batch.

    Attributes:
        per: None for the products over all parameters together; `"parameter"`, or a dict of names by group, for a dict
            with the products by each, as for `Norms`.
        other: h, `{name: (n, *parameter.shape)}`, as `source.per_sample` returns it; None for G itself.

    Raises:
        OptionError: `per` names no parameter, or one in two groups; or `other` has not those of the model.
    """

    per: Per = None
    other: Mapping[str, Tensor] | None = None
    name: str = "gram"

    def begin(self, setting: Setting) -> Accumulation[Tensor | dict[str, Tensor]]:
        if self.other is None:
            return _Gram(ByGroup(self.per, setting, setting.size, setting.size))
        columns = _columns(self.other, setting)
        return _Cross(ByGroup(self.per, setting, setting.size, columns), self.other)


class _Gram(Accumulation[Tensor | dict[str, Tensor]]):
    """In each round the samples of one block meet all those that come after; a block of all samples needs one."""

    def __init__(self, products: ByGroup) -> None:
        self._products = products
        self._from = self._until = 0  # the samples that meet the others in this round
        self._size = next(iter(products.values.values())).shape[0] if products.values else 0
        self._held: dict[str, Tensor] = {}

    def add(self, block: Block) -> None:
        products = self._products.of(block.name)
        if block.start < self._from:
            return
        if block.start == self._from:
            self._until = block.start + block.size
            if block.size == self._size:
                if products is not None:
                    products += block.gram().to(products)
                return
            self._held[block.name] = block.formed()
        if products is None:
            return
        held = self._held[block.name]
        found = block.products(held).to(products)
        met = slice(self._from, self._until)
        products[block.samples, met] += found
        if block.start != self._from:
            products[met, block.samples] += found.mT

    def another_round(self) -> bool:
        self._held, self._from = {}, self._until
        return 0 < self._until < self._size

    def result(self) -> Tensor | dict[str, Tensor]:
        return self._products.result()


class _Cross(Accumulation[Tensor | dict[str, Tensor]]):
    def __init__(self, products: ByGroup, other: Mapping[str, Tensor]) -> None:
        self._products, self._other = products, other

    def add(self, block: Block) -> None:
        products = self._products.of(block.name)
        if products is not None:
            products[block.samples] += block.products(self._other[block.name]).to(products)

    def result(self) -> Tensor | dict[str, Tensor]:
        return self._products.result()


def _columns(other: Mapping[str, Tensor], setting: Setting) -> int:
    """Return how many gradients `other` holds."""
    counts = set()
    for name, p in setting.parameters.items():
        if name not in other or other[name].shape[1:] != p.shape or other[name].dim() == 0:
            raise OptionError(
                f"other has no gradients of parameter {name!r} of shape (n, {', '.join(map(str, p.shape))}): pass what "
                "source.per_sample(inputs, targets) returns for a second batch."
            )
        counts.add(len(other[name]))
    if len(counts) > 1:
        raise OptionError(f"other has different numbers of gradients by parameter: {sorted(counts)}.")
    return counts.pop() if counts else 0
