"""Norms, sums and clipping by BackPACK's and Opacus' own rules where these are right, else from their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import persample
from persample.errors import UnsupportedModelError
from persample.quantities import Gram, Mean, Norms, SecondMoment, Variance, WeightedSum, clipping
from persample.testing.zoo.case import Net, tie

pytest.importorskip("backpack")
pytest.importorskip("opacus")

CLASSES = 4

#: Makes inputs of a batch of the given size.
Inputs = Callable[[int], Tensor]


@pytest.fixture(params=["backpack", "opacus"])
def peer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def reals(*shape: int) -> Inputs:
    return lambda size: torch.randn(size, *shape)


def tokens(*shape: int) -> Inputs:
    return lambda size: torch.randint(7, (size, *shape))


def pooled(**parts: nn.Module) -> nn.Module:
    """The parts one after the other, the mean over positions, and a head."""

    def forward(m: Net, x: Tensor) -> Tensor:
        for name in parts:
            x = getattr(m, name)(x)
        logits: Tensor = m.head(x.mean(1))
        return logits

    return Net(forward, **parts, head=nn.Linear(6, CLASSES))


def images(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(CLASSES))


def twice() -> nn.Module:
    def forward(m: Net, x: Tensor) -> Tensor:
        y: Tensor = m.head(m.inner(m.inner(x).tanh()))
        return y

    return Net(forward, inner=nn.Linear(6, 6), head=nn.Linear(6, CLASSES))


def tied_layers() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, CLASSES))
    return tie(model, **{"2.weight": "0.weight"})


def partly_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    model[0].weight.requires_grad_(False)
    model[2].requires_grad_(False)
    return model


def centred() -> nn.Module:
    """Of which the gradient of the bias vanishes, and that of the weight nearly: it is the same at all positions."""

    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.inner(x)
        h = h - (1 - 1e-4) * h.mean(1, keepdim=True)
        logits: Tensor = m.head(h.square().mean(1))
        return logits

    return Net(forward, inner=nn.Linear(40, 50), head=nn.Linear(50, CLASSES))


#: Models, inputs of one sample, and what gives the norms of one parameter with BackPACK and with Opacus: the beginning
#: of what `norms_by` says; None where the model is refused.
CASES: dict[str, tuple[Callable[[], nn.Module], Inputs, str, str | None, str | None]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, CLASSES)),
        reals(6), "0.weight", "BatchL2Grad", "norm sampler",
    ),
    "bias-free": (
        lambda: nn.Sequential(nn.Linear(6, 9, bias=False), nn.ReLU(), nn.Linear(9, CLASSES)),
        reals(6), "0.weight", "BatchL2Grad", "norm sampler",
    ),
    "frozen parameters": (partly_frozen, reals(6), "0.bias", "BatchL2Grad", "norm sampler"),
    "few positions": (
        lambda: pooled(wide=nn.Linear(40, 50), act=nn.Tanh(), narrow=nn.Linear(50, 6)),
        reals(3, 40), "wide.weight", "BatchL2Grad", "norm sampler",
    ),
    "a bias on positions": (
        lambda: pooled(wide=nn.Linear(40, 50), act=nn.Tanh(), narrow=nn.Linear(50, 6)),
        reals(3, 40), "wide.bias", "BatchL2Grad", "grad sampler: 'wide.bias' is a bias on positions",
    ),
    "many positions": (
        lambda: pooled(inner=nn.Linear(5, 6)),
        reals(20, 5), "inner.weight", "BatchL2Grad", "grad sampler: 'inner.weight' is used on so many positions",
    ),
    "two dimensions of positions": (
        lambda: Net(lambda m, x: m.head(m.inner(x).mean((1, 2))), inner=nn.Linear(40, 50), head=nn.Linear(50, CLASSES)),
        reals(2, 2, 40), "inner.weight", "BatchL2Grad", "grad sampler: 'inner.weight' is used on inputs of 4",
    ),
    "positions that cancel": (
        centred,
        lambda size: torch.randn(size, 1, 40) + 1e-3 * torch.randn(size, 4, 40), "inner.weight",
        "BatchGrad: 'inner.weight' has gradients that are small", "grad sampler: 'inner.weight' has gradients that are",
    ),
    "convolution": (
        lambda: images(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 2, dilation=2, bias=False)),
        reals(2, 8, 8), "0.weight", "BatchL2Grad", "grad sampler: '0.weight' is that of a Conv2d",
    ),
    "grouped convolution": (
        lambda: images(nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 4, 1, groups=4)),
        reals(4, 6, 6), "0.weight", "BatchGrad: '0.weight' is that of a convolution in 2 groups", "grad sampler",
    ),
    "bias of a grouped convolution": (
        lambda: images(nn.Conv2d(4, 4, 3, groups=2), nn.ReLU()), reals(4, 6, 6), "0.bias", "BatchL2Grad", "grad",
    ),
    "grouped transposed convolution": (
        lambda: images(nn.ConvTranspose2d(4, 4, 3, groups=2), nn.ReLU()),
        reals(4, 4, 4), "0.weight", "BatchGrad: '0.weight' is that of a convolution in 2 groups", "grad sampler",
    ),
    "transposed convolution": (
        lambda: images(nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1), nn.ReLU()),
        reals(4, 4, 4), "0.weight", "BatchL2Grad", "grad sampler",
    ),
    "padding in words": (
        lambda: images(nn.Conv2d(2, 4, 3, padding="valid"), nn.ReLU()),
        reals(2, 6, 6), "0.weight", "BatchGrad: '0.weight' is that of a convolution with padding='valid'", "grad",
    ),
    "one dimension": (
        lambda: images(nn.Conv1d(2, 4, 3, padding="valid"), nn.ReLU()), reals(2, 9), "0.weight", "BatchL2Grad", "grad",
    ),
    "layer used twice": (
        twice, reals(6), "inner.weight", "BatchGrad: 'inner.weight' is used more than once", "grad sampler: 'inner.w",
    ),
    "weights of two layers": (
        tied_layers, reals(6), "0.weight", "BatchGrad: '0.weight' is used more than once", "grad sampler: '0.weight' i",
    ),
    "table": (
        lambda: pooled(table=nn.Embedding(7, 6)), tokens(9), "table.weight", "BatchL2Grad", "norm sampler",
    ),
    "large indices": (
        lambda: pooled(table=nn.Embedding(3000, 6)),
        lambda size: torch.randint(2990, 3000, (size, 9)), "table.weight", "BatchL2Grad", "norm sampler",
    ),
    "one index": (
        lambda: nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, CLASSES)),
        tokens(), "0.weight", "BatchL2Grad", "norm sampler",
    ),
    "table with a padding index": (
        lambda: pooled(table=nn.Embedding(7, 6, padding_idx=2)), tokens(9), "table.weight", None, None,
    ),
    "tied head": (
        lambda: Net(lambda m, x: (m.table(x) @ m.table.weight.T).mean(1)[:, :CLASSES], table=nn.Embedding(7, 6)),
        tokens(5), "table.weight", None, None,
    ),
    "normalisation": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, CLASSES)),
        reals(6), "1.weight", None, "grad sampler: '1.weight' is that of a LayerNorm",
    ),
    "attention": (
        lambda: Net(lambda m, x: m.head(m.attend(x, x, x)[0].mean(1)), attend=nn.MultiheadAttention(6, 2,
            batch_first=True), head=nn.Linear(6, CLASSES)),
        reals(5, 6), "head.weight", None, None,
    ),
}  # fmt: skip


def rows_of(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The gradients by the definition, as matrices, in float64."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for i in range(len(x)):
        found = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(parameters.values()))
        for name, g in zip(parameters, found, strict=True):
            rows[name].append(g.flatten())
    return {name: torch.stack(found) for name, found in rows.items()}


def problem(name: str, size: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A model in float64, whose numbers are those of float32."""
    make, inputs, *_ = CASES[name]
    model, x = make(), inputs(size)
    model(x)
    return model.double(), x.double() if x.is_floating_point() else x, torch.randint(CLASSES, (size,))


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_quantities_are_exact_whatever_gives_them(peer: str, name: str, dtype: torch.dtype, size: int) -> None:
    model, x, y = problem(name, size)
    rows = rows_of(model, x, y)
    if isinstance(next(model.children()), nn.Embedding) and peer == "backpack":
        torch.set_default_dtype(dtype)  # in which BackPACK computes those of tables
    try:
        source = persample.make_source(peer, model.to(dtype), persample.losses.cross_entropy)
        x = x.to(dtype) if x.is_floating_point() else x
        check(source, x, y, rows, CASES[name], 1e-9 if dtype == torch.float64 else 1e-4)
    finally:
        torch.set_default_dtype(torch.float32)


def check(source: Any, x: Tensor, y: Tensor, rows: dict[str, Tensor], case: Any, relative: float) -> None:
    _, _, parameter, by_backpack, by_opacus = case
    by = by_backpack if source.own == "extend" else by_opacus
    g = torch.cat(list(rows.values()), 1)
    norms, largest = g.norm(dim=1), float(g.norm(dim=1).max())
    halves = {"some": list(rows)[: len(rows) // 2], "others": list(rows)[len(rows) // 2 :]}
    together, single, grouped = Norms(), Norms(per="parameter", name="single"), Norms(per=halves, name="grouped")
    clipped, given = WeightedSum(clipping(float(norms.median()))), WeightedSum(torch.linspace(-1, 2, len(g)), "given")
    asked = [together, single, grouped, clipped, given, Gram(), Mean(), SecondMoment()]
    asked += [Variance()] if len(g) > 1 else []
    if by is None:
        with pytest.raises(UnsupportedModelError):
            source.compute(x, y, *asked)
        return
    found = source.compute(x, y, *asked)
    assert source.ran == "rules"
    assert source.norms_by[parameter].startswith(by)

    def require(value: Tensor, due: Tensor, size: float) -> None:
        assert float((value.double() - due).abs().max()) <= relative * size

    def flat(of_each: dict[str, Tensor]) -> Tensor:
        return torch.cat([value.flatten() for value in of_each.values()])

    require(found[together], norms, largest)
    for n, r in rows.items():
        require(found[single][n], r.norm(dim=1), largest)
    for half, names in halves.items():
        if names:
            require(found[grouped][half], torch.cat([rows[n] for n in names], 1).norm(dim=1), largest)
    weights = (norms.median() / norms).clamp(max=1)
    require(found[clipped].weights, weights, 1)
    require(flat(found[clipped].gradient), weights @ g, largest)
    require(flat(found[given].gradient), torch.linspace(-1, 2, len(g)).double() @ g, 2 * largest)
    require(found.gram, g @ g.T, largest**2)
    require(flat(found.mean), g.mean(0), largest)
    require(flat(found.second_moment), g.square().mean(0), largest**2)
    if len(g) > 1:
        require(flat(found.variance), g.var(0), largest**2)


@pytest.mark.parametrize("machinery", ["auto", "rules", "own"])
def test_which_of_them_runs(peer: str, machinery: str) -> None:
    model, x, y = problem("mlp", 5)
    own = {"backpack": "extend", "opacus": "module"}[peer]
    chosen = own if machinery == "own" else machinery
    source = persample.make_source(peer, model, persample.losses.cross_entropy, machinery=chosen)
    due = torch.cat(list(rows_of(model, x, y).values()), 1).norm(dim=1)
    torch.testing.assert_close(source.norms(x, y), due, rtol=1e-9, atol=0)
    assert source.ran == (own if machinery == "own" else "rules")
    assert bool(source.norms_by) == (machinery != "own")
    assert bool(source.ran_because) == (machinery == "auto")


@pytest.mark.parametrize("max_bytes", [1, 8 * 60, 2**28])
def test_gradients_are_formed_within_the_budget(peer: str, max_bytes: int) -> None:
    model, x, y = problem("grouped convolution", 6)
    g = torch.cat(list(rows_of(model, x, y).values()), 1)
    source = persample.make_source(peer, model, persample.losses.cross_entropy)
    found = source.compute(x, y, Norms(), Gram(), WeightedSum(clipping(0.1)), max_bytes=max_bytes)
    torch.testing.assert_close(found.norms, g.norm(dim=1), rtol=1e-9, atol=0)
    torch.testing.assert_close(found.gram, g @ g.T, rtol=1e-9, atol=1e-12)


def test_crosscheck_tells_which_gave_the_moments(peer: str) -> None:
    model, x, y = problem("mlp", 5)
    (found,) = persample.crosscheck(model, persample.losses.cross_entropy, x, y, backends=[peer], quantities=[Norms()])
    assert found.agrees
    assert found.name == {"backpack": "backpack (extend)", "opacus": "opacus (module)"}[peer]


def test_dropout_needs_no_budget(peer: str) -> None:
    model = nn.Sequential(nn.Linear(6, 30), nn.Dropout(0.5), nn.Linear(30, CLASSES)).double()
    x, y = torch.randn(6, 6).double(), torch.randint(CLASSES, (6,))
    source = persample.make_source(peer, model, persample.losses.cross_entropy)
    torch.manual_seed(1)
    norms = source.compute(x, y, Norms(), max_bytes=1).norms
    torch.manual_seed(1)
    due = persample.make_source("loop", model, persample.losses.cross_entropy).norms(x, y)
    torch.testing.assert_close(norms, due, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_explain_says_beforehand_what_gives_the_norms(peer: str, name: str) -> None:
    model, x, y = problem(name, 5)
    model, x = model.float(), x.float() if x.is_floating_point() else x
    _, _, parameter, *by_each = CASES[name]
    by = by_each[0 if peer == "backpack" else 1]
    told = persample.explain(model, x, y, persample.losses.cross_entropy, backend=peer)
    row = next(row for row in told.rows if row.name == parameter)
    if by is None:
        assert not row.norms
    elif "gradients that are" in by:  # which their values tell
        assert row.norms in ("BatchL2Grad", "norm sampler")
    else:
        assert row.norms.startswith(by)
        assert f"norms by {row.norms.split(':')[0]}" in str(told)
    assert not persample.explain(model, x, y, persample.losses.cross_entropy, backend="fused").rows[0].norms


def test_what_the_user_has_put_on_the_parameters_stays() -> None:
    model, x, y = problem("mlp", 5)
    for p in model.parameters():
        vars(p).update(batch_l2="mine", grad_batch="mine", sum_grad_squared="mine", grad_sum="mine")
    before = [dict(vars(p)) for p in model.parameters()]
    source = persample.make_source("backpack", model, persample.losses.cross_entropy)
    asked = [Norms(), Variance(), WeightedSum(clipping(1.0)), Gram()]
    source.compute(x, y, *asked)
    with source.recording(quantities=asked):
        F.cross_entropy(model(x), y).backward()
    assert [vars(p) for p in model.parameters()] == before
