"""A quantity of somebody else's that reads the gradients twice, as the docs describe it, from every backend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import persample
from persample.quantities import Accumulation, Block, Norms, Setting

from .test_quantities import BACKENDS, GROUPS, Problem, matrix, require_equal, rows_of


@dataclass(frozen=True)
class CosineWithMean:
    """The cosine between each gradient and the mean of all; a parameter that is not reached adds nothing."""

    name: str = "cosine"

    def begin(self, setting: Setting) -> Accumulation[Tensor]:
        return _CosineWithMean(setting)


class _CosineWithMean(Accumulation[Tensor]):
    rereads, summing = True, True

    def __init__(self, setting: Setting) -> None:
        self.total = {name: setting.zeros(*p.shape) for name, p in setting.parameters.items()}
        self.products, self.squares = setting.zeros(setting.size), setting.zeros(setting.size)

    def add(self, block: Block) -> None:
        if self.summing:
            self.total[block.name] += block.sums()[0]
            self.squares[block.samples] += block.squared_norms()
        else:
            self.products[block.samples] += block.products(self.total[block.name].unsqueeze(0)).squeeze(1)

    def another_round(self) -> bool:
        again, self.summing = self.summing, False
        return again

    def result(self) -> Tensor:
        length = torch.stack([total.norm() for total in self.total.values()]).norm()
        return self.products / (self.squares.sqrt() * length)


@pytest.mark.parametrize("grouped", [False, True], ids=["single", "grouped"])
@pytest.mark.parametrize("pieces", [False, True], ids=["at once", "in pieces"])
@pytest.mark.parametrize("name", ["layers", "positions", "tied"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_quantity_that_reads_twice(backend: str, name: str, pieces: bool, grouped: bool) -> None:
    problem, cosine = Problem.named(name), CosineWithMean()
    g = matrix(rows_of(problem.model, problem.x, problem.y))
    if grouped:
        g = torch.stack([g[[group == each for each in GROUPS]].sum(0) for group in sorted(set(GROUPS))])
    try:
        several = problem.source(backend).compute(
            problem.x,
            problem.y,
            Norms(),
            cosine,
            groups=GROUPS if grouped else None,
            max_bytes=8 * g.shape[1] * 2 if pieces else 2**28,
        )
    except persample.errors.UnsupportedModelError:
        assert name == "tied"
        assert backend not in ("loop", "fused", "vjp")
        return
    require_equal(several[cosine], torch.cosine_similarity(g, g.mean(0, keepdim=True)))
    require_equal(several.norms, g.norm(dim=1))


def test_zeros_are_precise_enough_for_sums() -> None:
    half = torch.zeros(2, dtype=torch.float16)
    assert Setting(3, {}).zeros(3).dtype == torch.float32
    assert Setting(3, {"a": half}).zeros(3, 2).dtype == torch.float32
    assert Setting(3, {"a": half, "b": half.double()}).zeros().dtype == torch.float64
    assert Setting(3, {"a": half.to("meta")}).zeros(1).device.type == "meta"


class Failing(Accumulation[Tensor]):
    def __init__(self, where: str) -> None:
        self.where = where

    def add(self, block: Block) -> None:
        if self.where == "add":
            block.products(torch.zeros(3, 3, 3, dtype=torch.float64))

    def another_round(self) -> bool:
        return bool(torch.zeros(2)) if self.where == "another_round" else False

    def result(self) -> Tensor:
        found: dict[str, Tensor] = {}
        return found[self.where]


@dataclass(frozen=True)
class Faulty:
    where: str
    name: str = "mine"

    def begin(self, setting: Setting) -> Accumulation[Tensor]:
        if self.where == "begin":
            raise ValueError(self.where)
        return Failing(self.where) if self.where != "no accumulation" else {}  # type: ignore[return-value]


@pytest.mark.parametrize("where", ["begin", "add", "another_round", "result", "no accumulation"])
@pytest.mark.parametrize("backend", ["loop", "hooks", "fused", "backpack", "opacus"])
def test_faults_of_a_quantity_are_not_the_backends(backend: str, where: str) -> None:
    problem = Problem.named("layers")
    source = problem.source(backend)
    what = "returned dict" if where == "no accumulation" else "failed"
    method = "begin" if where == "no accumulation" else where
    with pytest.raises(persample.errors.QuantityError, match=rf"^{method}\(\) of quantity 'mine' {what}"):
        source.compute(problem.x, problem.y, Norms(), Faulty(where))
    with (
        pytest.raises(persample.errors.QuantityError, match=rf"^{method}\(\) of quantity 'mine' {what}"),
        source.recording(quantities=[Faulty(where)]),
    ):
        torch.nn.functional.cross_entropy(problem.model(problem.x), problem.y).backward()


@dataclass(frozen=True)
class BrokenBlock(Block):
    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        raise KeyError("broken")


class BrokenSource(persample.sources.LoopSource):
    def compute_blocks(self, batch: Any, receive: Any, max_bytes: int) -> Tensor:
        for name in self.parameters():
            receive(BrokenBlock(name, 0, batch.size))
        return torch.zeros(batch.size)


def test_faults_of_a_backend_are_not_the_quantitys() -> None:
    problem = Problem.named("layers")
    with pytest.raises(persample.errors.UnsupportedModelError, match="BrokenSource failed"):
        BrokenSource(problem.model, persample.losses.cross_entropy).compute(problem.x, problem.y, Norms())
