"""Every quantity from every backend, compared with what NumPy-like arithmetic makes of a loop in float64."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import persample
from persample.errors import ContractError
from persample.quantities import (
    Accumulation,
    Block,
    Gram,
    Mean,
    Norms,
    PerSample,
    Projection,
    SecondMoment,
    Setting,
    Variance,
    WeightedSum,
    clipping,
)
from persample.quantities.block import Formed
from persample.sources.selfcheck.rounds import Reading

BACKENDS = ("loop", "hooks", "fused", "vmap", "vjp", "backpack", "opacus")
SAMPLES = 7
CLASSES = 5


class Tied(nn.Module):
    """A table that is looked up and multiplied with, a layer that is called twice, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(CLASSES + 2, 6)
        self.twice = nn.Linear(6, 6)
        self.unreached = nn.Linear(2, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = (self.twice(self.twice(self.table(tokens)).relu()) @ self.table.weight.T).mean(1)
        return logits


class Twice(nn.Module):
    """Layers of which one is called twice, with and without positions, and one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6, padding_idx=0)
        self.inner, self.norm, self.frozen = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.inner(self.inner(self.table(tokens)).tanh())).mean(1)
        logits: Tensor = self.head(self.frozen(x))
        return logits


class Expressions(nn.Module):
    """Weights made of parameters: transposed, a part of one, a low-rank product, normalised; and a single number."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 7))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.transposed, self.direction = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(CLASSES, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.left @ self.right).tanh() @ self.transposed[:, :6].T
        return F.linear(self.scale * x, F.normalize(self.direction, dim=1), self.direction[:, 0])


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2, padding=1),
        nn.ReLU(),
        nn.GroupNorm(2, 8),
        nn.Conv2d(8, 6, 3, stride=2, dilation=2, padding="valid"),
        nn.ConvTranspose2d(6, 4, 2),
        nn.Flatten(),
        nn.Linear(36, CLASSES),
    )


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "layers": lambda: (nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, CLASSES)), torch.randn(SAMPLES, 7)),
    "positions": lambda: (
        nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3), nn.Flatten(), nn.Linear(12, CLASSES)),
        torch.randn(SAMPLES, 4, 7),
    ),
    "many positions": lambda: (
        nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2), nn.Flatten(), nn.Linear(40, CLASSES)),
        torch.randn(SAMPLES, 20, 2),
    ),
    "images": lambda: (images(), torch.randn(SAMPLES, 4, 8, 8)),
    "tied": lambda: (Tied(), torch.randint(0, CLASSES, (SAMPLES, 4))),
    "twice": lambda: (Twice(), torch.randint(0, 9, (SAMPLES, 4))),
    "expressions": lambda: (Expressions(), torch.randn(SAMPLES, 7)),
}
#: Models that a backend may refuse; what it does not refuse is exact.
MAY_REFUSE = {"tied", "twice", "expressions", "images"}


def rows_of(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The gradients by the definition."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for (name, p), g in zip(parameters.items(), found, strict=True):
            rows[name].append(torch.zeros_like(p) if g is None else g)
    return {name: torch.stack(found) for name, found in rows.items()}


def matrix(rows: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.reshape(len(g), g[0].numel()) for g in rows.values()], 1)


def flat(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradient.values()])


def require_equal(found: Tensor, due: Tensor) -> None:
    assert found.shape == due.shape
    assert float((found - due).abs().max()) <= 1e-9 * float(due.abs().max())


@dataclass
class Problem:
    model: nn.Module
    x: Tensor
    y: Tensor

    @classmethod
    def named(cls, name: str) -> "Problem":
        torch.manual_seed(0)
        model, x = MODELS[name]()
        inputs = x.double() if x.is_floating_point() else x
        return cls(model.double(), inputs, torch.randint(0, CLASSES, (SAMPLES,)))

    def source(self, backend: str, **options: Any) -> persample.PerSampleGradSource:
        return persample.make_source(backend, self.model, persample.losses.cross_entropy, **options)


GROUPS = [3, 1, 3, -7, 3, 1, 0]


@pytest.mark.parametrize("grouped", [False, True], ids=["single", "grouped"])
@pytest.mark.parametrize("pieces", [False, True], ids=["at once", "in pieces"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_all_quantities_in_one_pass(backend: str, name: str, pieces: bool, grouped: bool) -> None:
    problem = Problem.named(name)
    single = rows_of(problem.model, problem.x, problem.y)
    rows = {
        n: torch.stack([g[[i == k for i in GROUPS]].sum(0) for k in sorted(set(GROUPS))]) for n, g in single.items()
    }
    rows = rows if grouped else single
    g = matrix(rows)
    weights = torch.linspace(-1, 2, len(g), dtype=torch.float64)
    asked = {
        "mean": Mean(),
        "second_moment": SecondMoment(),
        "variance": Variance(),
        "per_sample": PerSample(),
        "norms": Norms(),
        "by_parameter": Norms(per="parameter", name="by_parameter"),
        "clipped": WeightedSum(clipping(float(g.norm(dim=1).median())), name="clipped"),
        "given": WeightedSum(weights, name="given"),
        "gram": Gram(),
        "grams": Gram(per="parameter", name="grams"),
        "cross": Gram(other={n: r[:3] for n, r in rows.items()}, name="cross"),
        "projection": Projection(3, seed=1),
    }
    max_bytes = 8 * g.shape[1] * 3 if pieces else 2**28
    try:
        several = problem.source(backend).compute(
            problem.x, problem.y, *asked.values(), groups=GROUPS if grouped else None, max_bytes=max_bytes
        )
    except persample.errors.UnsupportedModelError:
        assert name in MAY_REFUSE
        assert backend not in ("loop", "fused", "vjp")
        return
    norms = g.norm(dim=1)
    clipped = (norms.median() / norms).clamp(max=1)
    require_equal(several.losses, F.cross_entropy(problem.model(problem.x), problem.y, reduction="none"))
    require_equal(flat(several.mean), g.mean(0))
    require_equal(flat(several.second_moment), g.square().mean(0))
    require_equal(flat(several.variance), g.var(0))
    require_equal(matrix(several.per_sample), g)
    require_equal(several.norms, norms)
    require_equal(several.clipped.weights, clipped)
    require_equal(several.clipped.norms, norms)
    require_equal(flat(several.clipped.gradient), clipped @ g)
    require_equal(flat(several.given.gradient), weights @ g)
    require_equal(several.given.norms, norms)
    require_equal(several.gram, g @ g.T)
    require_equal(several.cross, g @ g[:3].T)
    projection = asked["projection"]
    assert isinstance(projection, Projection)
    random = torch.cat([m for n, r in rows.items() for _, m in projection.matrix(n, r[0].numel())])
    require_equal(several.projection, g @ random.double())
    largest = float(norms.max())
    for n, of_any_shape in rows.items():
        r = of_any_shape.reshape(len(g), of_any_shape[0].numel())
        assert float((several.by_parameter[n] - r.norm(dim=1)).abs().max()) <= 1e-9 * largest
        assert float((several.grams[n] - r @ r.T).abs().max()) <= 1e-9 * largest**2
    if grouped:
        assert several.groups.tolist() == sorted(set(GROUPS))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_of_passes_of_the_users(backend: str, name: str, reduction: Any) -> None:
    problem = Problem.named(name)
    rows = rows_of(problem.model, problem.x, problem.y)
    g, source, scale = matrix(rows), problem.source(backend), 1024.0
    norms = g.norm(dim=1)
    asked = [Norms(), WeightedSum(clipping(float(norms.median()))), Gram(), Variance(), PerSample()]
    try:
        with source.recording(reduction, quantities=asked, loss_scale=scale) as recorded:
            for part in (slice(0, SAMPLES), slice(0, 3)):
                loss = F.cross_entropy(problem.model(problem.x[part]), problem.y[part], reduction=reduction)
                (loss * scale).backward()
    except persample.errors.UnsupportedModelError:
        assert name in MAY_REFUSE
        assert backend not in ("loop", "fused", "vjp")
        return
    for several, part in zip(recorded.quantities, (slice(0, SAMPLES), slice(0, 3)), strict=True):
        due = g[part]
        assert several.losses.isnan().all()
        assert several.losses.shape == (len(due),)
        require_equal(several.norms, norms[part])
        clipped = (norms.median() / norms[part]).clamp(max=1)
        require_equal(flat(several.weighted_sum.gradient), clipped @ due)
        require_equal(several.gram, due @ due.T)
        require_equal(flat(several.variance), due.var(0))
        require_equal(matrix(several.per_sample), due)
    moments = recorded.moments()
    together = torch.cat([g, g[:3]])
    require_equal(flat(moments.mean), together.mean(0))
    require_equal(flat(moments.second_moment), together.square().mean(0))
    ordinary = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained(problem)])
    by_the_loss = g.mean(0) + g[:3].mean(0) if reduction == "mean" else together.sum(0)
    require_equal(ordinary / scale, by_the_loss)


def trained(problem: Problem) -> list[nn.Parameter]:
    return [p for p in problem.model.parameters() if p.requires_grad]


@pytest.mark.parametrize("backend", ["loop", "hooks", "fused"])
def test_of_a_pass_with_one_sample(backend: str) -> None:
    problem = Problem.named("layers")
    g = matrix(rows_of(problem.model, problem.x[:1], problem.y[:1]))
    with problem.source(backend).recording(quantities=[Norms(), Gram(), Mean()]) as recorded:
        F.cross_entropy(problem.model(problem.x[:1]), problem.y[:1]).backward()
    (several,) = recorded.quantities
    require_equal(several.norms, g.norm(dim=1))
    require_equal(several.gram, g @ g.T)
    require_equal(flat(several.mean), g[0])


@pytest.mark.parametrize("backend", ["loop", "hooks", "fused"])
def test_of_a_pass_that_a_gradient_scaler_skips(backend: str) -> None:
    problem = Problem.named("layers")
    with problem.source(backend).recording(quantities=[Norms(), WeightedSum(clipping(1.0))]) as recorded:
        (F.cross_entropy(problem.model(problem.x), problem.y) * torch.inf).backward()
    (several,) = recorded.quantities
    assert several.norms.shape == (SAMPLES,)
    assert not several.norms.isfinite().any()


class WrongNorms(persample.sources.LoopSource):
    """Right moments and sums, and norms that are too long."""

    def compute_blocks(self, batch: Any, receive: Any, max_bytes: int) -> Tensor:
        losses, gradients = self.compute_per_sample(batch)
        for name, g in gradients.items():
            receive(TooLong(name, 0, len(g), g))
        return losses


class TooLong(Formed):
    def compute_squared_norms(self) -> Tensor:
        return super().compute_squared_norms() * 1.1


def test_the_self_check_of_a_recording_sees_wrong_quantities() -> None:
    problem = Problem.named("layers")
    source = WrongNorms(problem.model, persample.losses.cross_entropy)
    with source.recording():
        F.cross_entropy(problem.model(problem.x), problem.y).backward()
    with (
        pytest.raises(persample.errors.DisagreementError, match="'norms'"),
        source.recording(quantities=[Norms()]),
    ):
        F.cross_entropy(problem.model(problem.x), problem.y).backward()


def test_options_of_recordings() -> None:
    source = Problem.named("layers").source("fused")
    for wrong in ({"quantities": [Norms]}, {"quantities": [Norms(), Norms()]}, {"loss_scale": 0.0}):
        with pytest.raises(persample.errors.OptionError), source.recording(**wrong):  # type: ignore[arg-type]
            pass


@pytest.mark.parametrize("backend", ["loop", "hooks", "fused"])
def test_short_forms(backend: str) -> None:
    problem = Problem.named("layers")
    source, g = problem.source(backend), matrix(rows_of(problem.model, problem.x, problem.y))
    require_equal(source.norms(problem.x, problem.y), g.norm(dim=1))
    require_equal(source.gram(problem.x, problem.y), g @ g.T)
    assert source.project(problem.x, problem.y, Projection(2)).shape == (SAMPLES, 2)
    clipped = source.weighted_sum(problem.x, problem.y, clipping(0.1))
    require_equal(flat(clipped.gradient), (0.1 / g.norm(dim=1)).clamp(max=1) @ g)
    require_equal(clipped.losses, F.cross_entropy(problem.model(problem.x), problem.y, reduction="none"))
    weights = torch.arange(SAMPLES)
    given = source.weighted_sum(problem.x, problem.y, weights)
    require_equal(flat(given.gradient), weights.double() @ g)
    require_equal(given.norms, g.norm(dim=1))
    assert torch.equal(given.weights, weights.double())
    require_equal(given.losses, clipped.losses)


@pytest.mark.parametrize("name", ["layers", "images", "tied"])
@pytest.mark.parametrize("parts", [False, True], ids=["at once", "in parts"])
@pytest.mark.parametrize("backend", ["loop", "fused", "vjp"])
def test_gram_with_a_second_batch(backend: str, parts: bool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem.named(name)
    source, g = problem.source(backend), matrix(rows_of(problem.model, problem.x, problem.y))
    if parts:
        monkeypatch.setattr("persample.sources.source.MAX_BYTES", 8 * g.shape[1] * 2)
    found = source.gram(problem.x[:4], problem.y[:4], other=(problem.x[2:], problem.y[2:]))
    require_equal(found, g[:4] @ g[2:].T)


def test_gram_in_parts_of_a_model_with_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(7, 30), nn.Dropout(0.5), nn.Linear(30, CLASSES))
    x, y = torch.randn(SAMPLES, 7), torch.randint(0, CLASSES, (SAMPLES,))
    source = persample.make_source("fused", model, persample.losses.cross_entropy)
    assert source.gram(x, y, other=(x[:3], y[:3])).shape == (SAMPLES, 3)
    monkeypatch.setattr("persample.sources.source.MAX_BYTES", 1)
    with pytest.raises(persample.errors.UnsupportedModelError, match="random numbers"):
        source.gram(x, y, other=(x[:3], y[:3]))


@dataclass(frozen=True)
class LargestEntry:
    """A quantity of somebody else's: the largest entry of each gradient, of which it reads the pieces."""

    name: str = "largest"

    def begin(self, setting: Setting) -> Accumulation[Tensor]:
        return _Largest(setting)


class _Largest(Accumulation[Tensor]):
    def __init__(self, setting: Setting) -> None:
        self.found = torch.zeros(setting.size, dtype=torch.float64)

    def add(self, block: Block) -> None:
        part = self.found[block.samples]
        for where, g in block.pieces():
            part[where] = torch.maximum(part[where], g.flatten(1).abs().amax(1))

    def result(self) -> Tensor:
        return self.found


@pytest.mark.parametrize("backend", ["loop", "hooks", "fused", "vmap"])
def test_own_quantity(backend: str) -> None:
    problem, largest = Problem.named("positions"), LargestEntry()
    several = problem.source(backend).compute(problem.x, problem.y, largest, Norms())
    require_equal(several[largest], matrix(rows_of(problem.model, problem.x, problem.y)).abs().amax(1))
    with pytest.raises(persample.errors.OptionError, match="none of the quantities"):
        several[LargestEntry("other")]


class WrongForWeights(persample.sources.LoopSource):
    """Exchanges two samples, which no plain sum shows."""

    def compute_per_sample(self, batch: persample.sources.Batch) -> tuple[Tensor, dict[str, Tensor]]:
        losses, gradients = super().compute_per_sample(batch)
        return losses, {name: g.flip(0) for name, g in gradients.items()}


def test_the_self_check_sees_exchanged_samples() -> None:
    problem = Problem.named("layers")
    source = WrongForWeights(problem.model, persample.losses.cross_entropy)
    with pytest.raises(persample.errors.DisagreementError, match="weighted sum"):
        source.norms(problem.x, problem.y)


@pytest.mark.parametrize("backend", ["loop", "fused", "hooks"])
def test_random_numbers(backend: str) -> None:
    """Clipping with dropout: the norms and the sum are of the same pass, and other pieces would draw other numbers."""
    model = nn.Sequential(nn.Linear(7, 30), nn.Dropout(0.5), nn.Linear(30, CLASSES)).double()
    x, y = torch.randn(SAMPLES, 7, dtype=torch.float64), torch.randint(0, CLASSES, (SAMPLES,))
    source = persample.make_source(backend, model, persample.losses.cross_entropy)
    norms, rows = Norms(), PerSample()
    torch.manual_seed(3)
    several = source.compute(x, y, norms, rows, WeightedSum(clipping(0.1)))
    g = matrix(several[rows])
    require_equal(several[norms], g.norm(dim=1))
    require_equal(flat(several.weighted_sum.gradient), (0.1 / g.norm(dim=1)).clamp(max=1) @ g)
    if backend == "loop":
        with pytest.raises(persample.errors.UnsupportedModelError, match="max_bytes"):
            source.compute(x, y, Norms(), max_bytes=1)


def test_options() -> None:
    problem = Problem.named("layers")
    source, x, y = problem.source("loop"), problem.x, problem.y
    with pytest.raises(persample.errors.OptionError, match="no quantity"):
        source.compute(x, y, Norms)  # type: ignore[arg-type]
    with pytest.raises(persample.errors.OptionError, match="Two results"):
        source.compute(x, y, Norms(), Norms(per="parameter"))
    with pytest.raises(persample.errors.OptionError, match="no parameter"):
        source.compute(x, y, Norms(per={"a": ["3"]}))
    with pytest.raises(persample.errors.OptionError, match="Group 'a' of per= is None"):
        source.compute(x, y, Norms(per={"a": None}))  # type: ignore[dict-item]
    with pytest.raises(persample.errors.OptionError, match="other must be a pair"):
        source.gram(x, y, other=x)  # type: ignore[arg-type]
    with pytest.raises(persample.errors.OptionError, match="in the groups"):
        source.compute(x, y, Norms(per={"a": ["0"], "b": ["0.weight"]}))
    with pytest.raises(persample.errors.OptionError, match=r"shape \(7,\)"):
        source.weighted_sum(x, y, torch.ones(SAMPLES, 1))
    with pytest.raises(persample.errors.BatchError, match="groups"):
        source.compute(x, y, Norms(), groups=[1.5] * SAMPLES)
    with pytest.raises(persample.errors.UsageError, match="one gradient"):
        source.compute(x[:1], y[:1], Variance())
    with pytest.raises(persample.errors.OptionError, match="size"):
        Projection(0)


def test_groups_of_parameters() -> None:
    problem = Problem.named("layers")
    rows = rows_of(problem.model, problem.x, problem.y)
    found = problem.source("fused").compute(problem.x, problem.y, Norms(per={"first": ["0"], "bias": "2.bias"})).norms
    require_equal(found["first"], matrix({n: g for n, g in rows.items() if n.startswith("0.")}).norm(dim=1))
    require_equal(found["bias"], rows["2.bias"].norm(dim=1))


def test_projections_keep_products() -> None:
    problem = Problem.named("layers")
    g = matrix(rows_of(problem.model, problem.x, problem.y))
    sketch = problem.source("fused").project(problem.x, problem.y, Projection(4000))
    assert float((sketch @ sketch.T - g @ g.T).abs().max()) < 0.1 * float((g @ g.T).abs().max())


class ThreeRounds(Accumulation[int]):
    """Counts the blocks of three rounds, and says `rereads` as long as it is told to."""

    rereads = True

    def __init__(self, says_so: bool) -> None:
        self.says_so, self.rounds, self.blocks = says_so, 1, 0

    def add(self, block: Block) -> None:
        self.blocks += 1

    def another_round(self) -> bool:
        self.rounds, self.rereads = self.rounds + 1, self.says_so
        return self.rounds <= 3

    def result(self) -> int:
        return self.blocks


@dataclass(frozen=True)
class Thrice:
    says_so: bool
    name: str = "thrice"

    def begin(self, setting: Setting) -> Accumulation[int]:
        return ThreeRounds(self.says_so)


def with_blocks(*asked: Any) -> tuple[Reading, list[weakref.ref[Block]], dict[str, Tensor]]:
    rows = {"a": torch.randn(3, 2), "b": torch.randn(3, 4, 5)}
    reading = Reading(asked, {name: g[0] for name, g in rows.items()}, 3)
    blocks = []
    for name, g in rows.items():
        block = Formed(name, 0, 3, g)
        blocks.append(weakref.ref(block))
        reading.receive(block)
    return reading, blocks, rows


@pytest.mark.parametrize("others", [(), (Thrice(True),)], ids=["alone", "beside one that reads on"])
def test_blocks_are_let_go_one_by_one_when_they_are_read_for_the_last_time(others: tuple[Thrice, ...]) -> None:
    torch.manual_seed(0)
    reading, blocks, rows = with_blocks(WeightedSum(clipping(1.0)), *others)
    gc.collect()
    alive = []

    def again(receive: Any) -> None:
        def counted(block: Block) -> None:
            del block
            alive.append(sum(ref() is not None for ref in blocks))

        reading.reread(lambda block: (receive(block), counted(block)))

    found, *counts = reading.results(again)
    norms = torch.cat([g.double().flatten(1) for g in rows.values()], 1).norm(dim=1)
    weights = (1 / norms).clamp(max=1)
    for name, g in rows.items():
        expected = torch.tensordot(weights, g.double(), 1)
        torch.testing.assert_close(found.gradient[name].double(), expected, rtol=1e-5, atol=1e-6)
    assert alive == ([2, 2, 2, 2] if others else [2, 1])
    assert counts == [6 for _ in others]


def test_blocks_that_were_let_go_are_not_read_again() -> None:
    reading, _, _ = with_blocks(Thrice(False))
    with pytest.raises(ContractError, match="ThreeRounds wants to read the gradients once more"):
        reading.results()
