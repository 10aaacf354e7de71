"""Quantities of passes that the user runs: of sums over groups of samples, and without anything computed twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import persample
from persample.errors import BatchError, OptionError, UnsupportedModelError
from persample.quantities import Gram, Mean, Norms, PerSample, Projection, SecondMoment, Variance, WeightedSum, clipping
from persample.sources.backends.contributions import OuterProducts, Terms

from .test_quantities import BACKENDS, MAY_REFUSE, MODELS, SAMPLES, Problem, flat, matrix, require_equal, rows_of

USERS = [3, 1, 3, -7, 1, 3, 1]


def summed(rows: dict[str, Tensor], users: list[int]) -> Tensor:
    """The sums over the samples of each user, in ascending order of the users."""
    g = matrix(rows)
    return torch.stack([g[[user == each for each in users]].sum(0) for user in sorted(set(users))])


@pytest.mark.parametrize("in_rounds", [False, True], ids=["at once", "in rounds"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_groups(backend: str, name: str, reduction: Any, in_rounds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if in_rounds:
        monkeypatch.setattr("persample.quantities.block.AT_ONCE", 50)
    problem = Problem.named(name)
    rows = rows_of(problem.model, problem.x, problem.y)
    g, single, scale = summed(rows, USERS), matrix(rows), 8.0
    norms = g.norm(dim=1)
    weights = torch.tensor([1.0, -2.0, 0.5])
    asked = {
        "norms": Norms(),
        "clipped": WeightedSum(clipping(float(norms.median())), name="clipped"),
        "given": WeightedSum(weights, name="given"),
        "gram": Gram(),
        "variance": Variance(),
        "second_moment": SecondMoment(),
        "per_sample": PerSample(),
        "projection": Projection(2),
    }
    try:
        source = problem.source(backend)
        with source.recording(reduction, quantities=[*asked.values()], groups=USERS, loss_scale=scale) as recorded:
            for _ in range(2):
                (F.cross_entropy(problem.model(problem.x), problem.y, reduction=reduction) * scale).backward()
    except UnsupportedModelError:
        assert name in MAY_REFUSE
        assert backend not in ("loop", "fused", "vjp")
        return
    assert len(recorded.quantities) == 2
    for several in recorded.quantities:
        assert several.groups is not None
        assert several.groups.tolist() == [-7, 1, 3]
        assert several.losses.shape == (SAMPLES,)
        require_equal(several.norms, norms)
        clipped = (norms.median() / norms).clamp(max=1)
        require_equal(several.clipped.weights, clipped)
        require_equal(flat(several.clipped.gradient), clipped @ g)
        require_equal(flat(several.given.gradient), weights.double() @ g)
        require_equal(several.gram, g @ g.T)
        require_equal(flat(several.variance), g.var(0))
        require_equal(flat(several.second_moment), g.square().mean(0))
        require_equal(matrix(several.per_sample), g)
        projection = asked["projection"]
        assert isinstance(projection, Projection)
        random = torch.cat([m for n, r in rows.items() for _, m in projection.matrix(n, r[0].numel())])
        require_equal(several.projection, g @ random.double())
    moments = recorded.moments()  # those of single samples
    require_equal(flat(moments.mean), single.mean(0))
    require_equal(flat(moments.second_moment), single.square().mean(0))


@pytest.mark.parametrize("users", [[5] * SAMPLES, list(range(SAMPLES, 0, -1))], ids=["one group", "groups of one"])
@pytest.mark.parametrize("backend", ["loop", "hooks", "fused", "vmap", "backpack", "opacus"])
def test_one_group_and_groups_of_one(backend: str, users: list[int]) -> None:
    problem = Problem.named("layers")
    g = summed(rows_of(problem.model, problem.x, problem.y), users)
    weights = torch.linspace(-1, 1, len(g))
    source = problem.source(backend)
    with source.recording(quantities=[Norms(), WeightedSum(weights)], groups=torch.tensor(users)) as recorded:
        F.cross_entropy(problem.model(problem.x), problem.y).backward()
    computed = source.compute(problem.x, problem.y, Norms(), WeightedSum(weights), groups=users)
    for several in (recorded.quantities[0], computed):
        require_equal(several.norms, g.norm(dim=1))
        require_equal(flat(several.weighted_sum.gradient), weights.double() @ g)
        assert several.groups.tolist() == sorted(set(users))


@pytest.mark.parametrize("backend", ["loop", "hooks", "fused", "backpack", "opacus"])
def test_a_pass_with_one_sample_in_a_group(backend: str) -> None:
    problem = Problem.named("layers")
    g = matrix(rows_of(problem.model, problem.x[:1], problem.y[:1]))
    with problem.source(backend).recording(quantities=[Norms(), Mean()], groups=[4]) as recorded:
        F.cross_entropy(problem.model(problem.x[:1]), problem.y[:1]).backward()
    require_equal(recorded.quantities[0].norms, g.norm(dim=1))
    require_equal(flat(recorded.quantities[0].mean), g[0])


@pytest.mark.parametrize("backend", ["loop", "hooks", "fused", "backpack", "opacus"])
def test_groups_of_a_pass_that_overflows(backend: str) -> None:
    problem = Problem.named("layers")
    with problem.source(backend).recording(quantities=[Norms()], groups=USERS) as recorded:
        (F.cross_entropy(problem.model(problem.x), problem.y) * torch.inf).backward()
    assert recorded.quantities[0].norms.shape == (3,)
    assert not recorded.quantities[0].norms.isfinite().any()


@pytest.mark.parametrize("backend", ["loop", "hooks", "fused", "backpack", "opacus"])
def test_groups_that_do_not_fit(backend: str) -> None:
    problem = Problem.named("layers")
    source = problem.source(backend)
    with pytest.raises(OptionError, match="pass quantities="), source.recording(groups=USERS):
        pass
    for wrong in (USERS[:-1], [0.5] * SAMPLES):
        with (
            pytest.raises(BatchError, match="whole number for each of the 7 samples"),
            source.recording(quantities=[Norms()], groups=wrong),  # type: ignore[arg-type]
        ):
            F.cross_entropy(problem.model(problem.x), problem.y).backward()
    assert not problem.model._forward_hooks
    with source.recording(quantities=[Norms()], groups=USERS) as recorded:
        F.cross_entropy(problem.model(problem.x), problem.y).backward()
    assert recorded.quantities[0].norms.shape == (3,)


@pytest.mark.parametrize("backend", ["loop", "hooks", "fused", "vjp", "backpack", "opacus"])
def test_groups_do_not_change_what_dropout_draws(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(7, 30), nn.Dropout(0.5), nn.Linear(30, 5)).double()
    x, y = torch.randn(SAMPLES, 7).double(), torch.randint(5, (SAMPLES,))
    torch.manual_seed(1)
    g = matrix(persample.make_source("loop", model, persample.losses.cross_entropy).per_sample(x, y))
    due = torch.stack([g[[user == each for each in USERS]].sum(0) for user in sorted(set(USERS))]).norm(dim=1)
    source = persample.make_source(backend, model, persample.losses.cross_entropy)
    torch.manual_seed(1)
    require_equal(source.compute(x, y, Norms(), groups=USERS).norms, due)
    torch.manual_seed(1)
    with source.recording(quantities=[Norms()], groups=USERS) as recorded:
        F.cross_entropy(model(x), y).backward()
    require_equal(recorded.quantities[0].norms, due)
    monkeypatch.setattr("persample.sources.selfcheck.rounds.AT_ONCE", 1)
    with pytest.raises(UnsupportedModelError, match="sort the batch by groups"):
        source.compute(x, y, Norms(), groups=USERS)
    assert source.compute(x, y, Norms(), groups=sorted(USERS)).norms.shape == (3,)


@pytest.mark.parametrize("backend", ["loop", "hooks", "fused", "backpack"])
def test_the_function_of_the_norms_is_called_once_and_may_know_its_batch_alone(backend: str) -> None:
    problem = Problem.named("layers")
    g, own = matrix(rows_of(problem.model, problem.x, problem.y)), torch.rand(SAMPLES).double()
    calls = []

    def weights(norms: Tensor) -> Tensor:
        calls.append(norms)
        return own / norms * len(calls)

    source = problem.source(backend)
    found = source.weighted_sum(problem.x, problem.y, weights)
    require_equal(flat(found.gradient), own / g.norm(dim=1) @ g)
    with source.recording(quantities=[WeightedSum(weights)]) as recorded:
        F.cross_entropy(problem.model(problem.x), problem.y).backward()
    require_equal(flat(recorded.quantities[0].weighted_sum.gradient), 2 * own / g.norm(dim=1) @ g)
    assert len(calls) == 2
    with pytest.raises(OptionError, match=r"shape \(7,\), one for each gradient; got list"):
        source.weighted_sum(problem.x, problem.y, [1.0] * SAMPLES)  # type: ignore[arg-type]


@pytest.mark.parametrize("curvature", ["exact", "printed"])
def test_hooks_add_up_what_moments_and_quantities_share_once(curvature: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem.named("positions")
    g = matrix(rows_of(problem.model, problem.x, problem.y))
    counts = {OuterProducts: 0, Terms: 0}
    for kind in counts:
        sums = kind.sums

        def counted(self: Any, sums: Any = sums, kind: Any = kind) -> Any:
            counts[kind] += 1
            return sums(self)

        monkeypatch.setattr(kind, "sums", counted)
    source = problem.source("hooks", check="never", curvature=curvature)
    due = source.moments(problem.x, problem.y).second_moment
    counts.update(dict.fromkeys(counts, 0))
    with source.recording(quantities=[Mean(), SecondMoment(), Variance(), PerSample()]) as recorded:
        F.cross_entropy(problem.model(problem.x), problem.y).backward()
    layers = sum(isinstance(module, nn.Linear) for module in problem.model.modules())
    if curvature == "exact":
        assert counts == {OuterProducts: layers, Terms: layers}
    (several,) = recorded.quantities
    require_equal(flat(several.variance), g.var(0))
    require_equal(flat(several.second_moment), g.square().mean(0))
    require_equal(flat(dict(recorded.moments().second_moment)), flat(dict(due)))
    require_equal(flat(dict(recorded.moments().mean)), g.mean(0))
