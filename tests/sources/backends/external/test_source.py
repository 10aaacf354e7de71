"""BackPACK and Opacus behind their names: by their own machinery where that is right, and refused where it is not."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import persample
from persample.errors import OptionError, PersampleError, UnknownBackendError, UnsupportedModelError
from persample.testing.zoo.case import Net, tie

from ...agreement import assert_close, assert_refused, assert_served, no_trace, squared_error, targets_for

pytest.importorskip("backpack")
pytest.importorskip("opacus")

from backpack import backpack, disable, extend
from backpack.context import CTX
from backpack.extensions import BatchGrad, SumGradSquared
from opacus import GradSampleModule

OWN = {"backpack": "extend", "opacus": "module"}


@pytest.fixture(params=list(OWN))
def peer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def own(peer: str) -> str:
    """The package's own machinery, by its name."""
    return f"{peer} ({OWN[peer]})"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def reals(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def lenet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 12), nn.ReLU(), nn.Linear(12, 10),
    ).double()  # fmt: skip


def mlp(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), *middle, nn.Linear(5, 2)).double()


def in_place() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)).double()


def net(function: Callable[..., Any], **parts: nn.Module) -> Net:
    return Net(function, **parts).double()


# Which of the two runs.


def test_the_machinery_is_the_default_and_gives_its_numbers(peer: str) -> None:
    model, inputs = lenet(), reals(4, 3, 32, 32)
    targets = targets_for(model, inputs)
    source = persample.make_source(peer, model, squared_error)
    moments, rows = source.moments(inputs, targets), source.per_sample(inputs, targets)
    assert (source.ran, source.ran_because) == (OWN[peer], "")
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if peer == "opacus":
            squared_error(GradSampleModule(twin, loss_reduction="sum")(inputs), targets).sum().backward()
            theirs = {name: p.grad_sample for name, p in twin.named_parameters()}
            squares = {name: g.square().mean(0) for name, g in theirs.items()}
        else:
            with backpack(BatchGrad(), SumGradSquared()):
                squared_error(extend(twin)(inputs), targets).sum().backward()
            theirs = {name: p.grad_batch for name, p in twin.named_parameters()}
            squares = {name: p.sum_grad_squared / 4 for name, p in twin.named_parameters()}
    torch.testing.assert_close(rows, theirs, rtol=0, atol=0)
    torch.testing.assert_close(dict(moments.second_moment), squares, rtol=0, atol=0)


def test_the_rules_serve_where_the_machinery_is_known_to_be_wrong(peer: str, own: str) -> None:
    model, inputs = in_place(), reals(3, 4)
    source = persample.make_source(peer, model, squared_error)
    source.moments(inputs, reals(3, 2))
    assert source.ran == "rules"
    assert "in place" in source.ran_because
    assert_served(peer, model, inputs)
    assert_refused(own, model, inputs, r"in place.*inplace=False.*Use machinery='rules'")
    assert_served(f"{peer} (rules)", model, inputs)


def test_what_was_found_in_a_forward_pass_is_remembered_for_batches_of_its_kind(peer: str) -> None:
    calls = []

    def forward(m: Net, x: Tensor, times: int) -> Tensor:
        calls.append(times)
        h = m.a(x)
        return h.mul_(2) if times == 2 else h

    model = net(forward, a=nn.Linear(4, 2))
    source = persample.make_source(peer, model, squared_error, check="never")
    ran = []
    for times in (1, 2, 2, 1, 1):
        calls.clear()
        source.moments((reals(3, 4), times), reals(3, 2))
        ran.append((source.ran, len(calls)))
    assert ran == [(OWN[peer], 1), ("rules", 3), ("rules", 1), (OWN[peer], 1), (OWN[peer], 1)]


def test_explain_crosscheck_and_benchmark_tell_which_ran(peer: str, own: str) -> None:
    inputs, targets = reals(3, 4), reals(3, 2)
    rules = f"{peer} (rules)"
    for model, served in ((mlp(), own), (in_place(), rules)):
        told = persample.explain(model, inputs, backend=peer)
        assert told.supported
        assert str(told).startswith(f"backend {served!r} serves this model")
        assert ("in place" in str(told)) == (served == rules)
        if served == own:
            assert persample.explain(model, backend=peer).machinery == OWN[peer]
        (agreement,) = persample.crosscheck(model, squared_error, inputs, targets, backends=[peer])
        assert agreement.agrees
        assert (agreement.backend, agreement.name) == (peer, served)
        _, cost = persample.benchmark(model, squared_error, inputs, targets, backends=[peer], rounds=1)
        assert (cost.backend, cost.name) == (peer, served)
    refused = persample.explain(model, inputs, backend=own)
    assert refused.supported is False
    assert "in place" in refused.refusals[0]


def test_all_machineries_stand_side_by_side() -> None:
    arguments = (mlp(), squared_error, reals(3, 4), reals(3, 2))
    names = ["backpack (extend)", "backpack (rules)", "opacus (module)", "opacus (rules)"]
    agreements = {a.name: a for a in persample.crosscheck(*arguments)}
    assert [name for name in agreements if name.startswith(("backpack", "opacus"))] == names
    assert all(agreements[name].agrees and agreements[name].backend == name for name in names)
    costs = persample.benchmark(*arguments, rounds=1)
    assert [cost.name for cost in costs if cost.backend.startswith(("backpack", "opacus"))] == names
    chosen = persample.crosscheck(*arguments, options={"opacus": {"machinery": "rules"}})
    assert [a.name for a in chosen if a.name.startswith("opacus")] == ["opacus (rules)"]


def test_options_that_are_not_known_or_contradict_each_other(peer: str, own: str) -> None:
    with pytest.raises(
        OptionError, match=rf"machinery='hooks' is not known: use one of 'auto', '{OWN[peer]}', 'rules'"
    ):
        persample.make_source(peer, mlp(), squared_error, machinery="hooks")
    with pytest.raises(OptionError, match="names one machinery, machinery='rules' another"):
        persample.make_source(own, mlp(), squared_error, machinery="rules")
    persample.make_source(own, mlp(), squared_error, machinery=OWN[peer])
    with pytest.raises(UnknownBackendError):
        persample.make_source(f"{peer} (hooks)", mlp(), squared_error)
    with pytest.raises(OptionError, match="'loop' has no option 'machinery'"):
        persample.make_source("loop", mlp(), squared_error, machinery="rules")


@pytest.mark.parametrize("machinery", ["auto", "own", "rules"])
def test_what_the_user_runs_is_recorded_by_the_rules_or_repeated(peer: str, machinery: str) -> None:
    model, inputs, targets = mlp(nn.Dropout()), reals(6, 4), reals(6, 2)
    torch.manual_seed(3)
    expected = persample.make_source("loop", model, squared_error).moments(inputs, targets)
    source = persample.make_source(peer, model, squared_error, machinery=OWN[peer] if machinery == "own" else machinery)
    torch.manual_seed(3)
    with source.recording() as recorded:
        squared_error(model(inputs), targets).mean().backward()
    assert source.ran == (OWN[peer] if machinery == "own" else "rules")
    assert_close(recorded.moments().mean, expected.mean)
    assert_close(recorded.moments().second_moment, expected.second_moment)
    assert not any("grad" in name for p in model.parameters() for name in vars(p))


def test_what_only_the_machinery_serves_is_repeated_when_it_is_recorded() -> None:
    model, inputs, targets = net(lambda m, x: m.scale * m.a(x), a=nn.Linear(4, 2), scale=nn.Parameter(torch.ones(2))), (
        reals(6, 4)
    ), reals(6, 2)  # fmt: skip
    source = persample.make_source("opacus", model, squared_error)
    with source.recording("sum") as recorded:
        squared_error(model(inputs), targets).sum().backward()
    assert source.ran == "module"
    expected = persample.make_source("loop", model, squared_error).moments(inputs, targets)
    assert_close(recorded.moments().second_moment, expected.second_moment)


# What is right.


def residual() -> nn.Module:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = F.relu(m.norm1(m.conv1(x)))
        output: Tensor = m.head(F.relu(m.norm2(m.conv2(h)) + m.shortcut(x)).mean((2, 3)))
        return output

    return net(
        forward,
        conv1=nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), norm1=nn.GroupNorm(2, 4),
        conv2=nn.Conv2d(4, 4, 3, padding=1, bias=False), norm2=nn.GroupNorm(2, 4),
        shortcut=nn.Conv2d(3, 4, 1, stride=2), head=nn.Linear(4, 3),
    )  # fmt: skip


def partly_frozen() -> nn.Module:
    model = mlp(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    model[4].requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lenet, (3, 32, 32)),
        (mlp, (4,)),
        (lambda: mlp(nn.Dropout()), (4,)),
        (lambda: mlp(nn.Dropout()).eval(), (4,)),
        (lambda: mlp().append(nn.Dropout().eval()), (4,)),
        (partly_frozen, (4,)),
        (lambda: partly_frozen().eval(), (4,)),
        (lambda: mlp().requires_grad_(False), (4,)),
        (lambda: mlp(nn.LayerNorm(5).requires_grad_(False)), (4,)),
        (lambda: mlp(nn.BatchNorm1d(5).requires_grad_(False).eval()), (4,)),
        (mlp, (3, 4)),
        (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(4, 2, 2)).double(), (2, 6, 5)),
        (lambda: net(lambda m, x: {"y": m.a(x)}["y"] + m.b(x).detach(), a=nn.Linear(4, 2), b=nn.Linear(4, 2)), (4,)),
        (lambda: net(lambda m, x: m.inner(x)["y"], inner=net(lambda m, x: {"y": m.a(x)}, a=nn.Linear(4, 2))), (4,)),
        (lambda: torch.compile(mlp(), backend="eager"), (4,)),
    ],
)
def test_served_by_the_machinery_of_both(own: str, make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    for size in (1, 3):
        assert_served(own, make(), reals(size, *shape))


class Scale(nn.Module):
    def __init__(self, times: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(5))
        self.times = times

    def forward(self, x: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        return self.times * self.scale * x + shift


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Vit(nn.Module):
    """A token and positions of its own beside layers."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 5, 6))
        self.patches, self.block = nn.Conv2d(1, 6, 2, 2), nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU())
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).mT
        h = torch.cat([self.token.expand(len(h), -1, -1), h], 1) + self.positions
        output: Tensor = self.head((h + self.block(h))[:, 0])
        return output


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (residual, (3, 6, 6)),
        (lambda: mlp(nn.LayerNorm(5), nn.Linear(5, 5), nn.RMSNorm(5)), (4,)),
        (lambda: mlp(Scale()), (4,)),
        (lambda: mlp(Doubled(5, 5)), (4,)),
        (lambda: mlp(nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))), (4,)),
        (Vit, (1, 4, 4)),
        (lambda: tie(mlp(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)), **{"4.weight": "2.weight"}), (4,)),
        (lambda: net(lambda m, x: m.a(m.a(x).tanh()) + m.a(x / 2), a=nn.Linear(4, 4)), (4,)),
        (lambda: nn.Sequential(nn.Conv1d(2, 3, 2, padding="same"), nn.PReLU(3), nn.ConvTranspose1d(3, 2, 2)), (2, 5)),
    ],
)
def test_served_by_grad_sample_module(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    assert_served("opacus (module)", make().double(), reals(3, *shape))
    assert_served("opacus", make().double(), reals(3, *shape))


def test_batch_norm_in_eval_mode_is_served_by_extend() -> None:
    model = mlp(nn.BatchNorm1d(5))
    model.train()(reals(9, 4))
    assert_served("backpack (extend)", model.eval(), reals(3, 4))


@pytest.mark.parametrize("dims", [(), (6,)])
def test_moments_by_extend_are_those_of_one_backward_pass(dims: tuple[int, ...], monkeypatch: Any) -> None:
    used: list[str] = []
    for kind in (BatchGrad, SumGradSquared):
        call = kind.__call__
        monkeypatch.setattr(
            kind, "__call__", lambda self, *args, call=call: (used.append(type(self).__name__), call(self, *args))[1]
        )
    source = persample.make_source("backpack (extend)", mlp(), squared_error, check="never")
    source.moments(reals(3, *dims, 4), reals(3, *dims, 2))
    # On sequences SumGradSquared holds a number for each pair of entries of a weight and for each position.
    assert set(used) == ({"BatchGrad"} if dims else {"SumGradSquared"})


# What is wrong, and refused.


def stray(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    m.a(9 * x)
    output: Tensor = y
    return output


def with_hook(kind: str) -> nn.Module:
    model = mlp()
    getattr(model[0], f"register_{kind}")(lambda *_: None)
    return model


def differentiating(m: Net, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(m.a(x).square().sum(), x)
    output: Tensor = m.b(x - slope)
    return output


def nested_twice() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), nn.Sequential(layer, nn.Linear(4, 2))).double()


def by_closure() -> nn.Module:
    layer = nn.Linear(4, 4).double()
    return net(lambda m, x: m.b(layer(x)), a=layer, b=nn.Linear(4, 2))


BOTH: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, bool]] = {
    # name: model, shape of a sample, reason, whether the rules serve it
    "stray call": (lambda: net(stray, a=nn.Linear(4, 2)), (4,), "'a' (is used by more|has a call that)", True),
    "in place": (lambda: net(lambda m, x: m.a(x).mul_(2), a=nn.Linear(4, 2)), (4,), "in place", True),
    "keyword": (
        lambda: net(lambda m, x: m.a(input=x), a=nn.Linear(4, 2)),
        (4,),
        "'a' was called with something other than one positional",
        True,
    ),
    "forward hook": (lambda: with_hook("forward_hook"), (4,), "Linear '0' has hooks", True),
    "backward hook": (lambda: with_hook("full_backward_hook"), (4,), "Linear '0' has hooks", True),
    "wrapped": (lambda: GradSampleModule(mlp()), (4,), "has hooks", True),
    "extended": (lambda: extend(mlp()), (4,), "has hooks", True),
    "checkpointing": (
        lambda: net(
            lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=False)),
            a=nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
            b=nn.Linear(4, 2),
        ),
        (4,),
        "runs again in the backward pass",
        True,
    ),
    "backward pass within": (
        lambda: net(differentiating, a=nn.Linear(4, 4), b=nn.Linear(4, 2)),
        (4,),
        "runs a backward pass in its forward pass, through Linear 'a'",
        True,
    ),
    "one module at two places": (nested_twice, (4,), "Linear '0' (belongs to 2 modules|is used by)", True),
    "closure": (by_closure, (4,), "'a.weight' is used outside", True),
    "bfloat16": (lambda: mlp().bfloat16(), (4,), "'0.weight' in torch.bfloat16", True),
    "tied head": (
        lambda: net(lambda m, x: F.linear(m.a(x), m.a.weight), a=nn.Linear(4, 4)),
        (4,),
        "'a.weight' is used outside",
        False,
    ),
    "time before samples": (
        lambda: net(lambda m, x: m.a(x.transpose(0, 1)).transpose(0, 1), a=nn.Linear(4, 4)),
        (5, 4),
        r"shape \(5, 3, 4\)",
        False,
    ),
    "folded": (
        lambda: net(lambda m, x: m.a(x.flatten(0, 1)).unflatten(0, (len(x), -1)), a=nn.Linear(4, 4)),
        (5, 4),
        r"shape \(15, 4\)",
        False,
    ),
    "reordered": (
        lambda: net(lambda m, x: m.b(m.a(x).flip(0)).flip(0), a=nn.Linear(4, 4), b=nn.Linear(4, 4)),
        (4,),
        "reorders entries of dim 0",
        False,
    ),
    "circular": (
        lambda: nn.Sequential(nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular")).double(),
        (2, 5),
        "padding_mode='circular'",
        False,
    ),
}


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore::DeprecationWarning")
def test_refused_by_name_by_the_machinery_of_both(peer: str, own: str, name: str) -> None:
    make, shape, reason, rules = BOTH[name]
    torch.manual_seed(1)
    model = make()
    inputs = reals(3, *shape).to(next(model.parameters()).dtype)
    advice = ".*Use machinery='rules'" if rules and name != "closure" else ""
    assert_refused(own, model, inputs, f"(?s){reason}{advice}")
    if not rules:
        assert_refused(peer, model, inputs, reason)
    elif name != "bfloat16":
        assert_served(peer, model, inputs)


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (nn.LayerNorm(5), (4,), "LayerNorm '2' has parameters, and BackPACK has no rule"),
        (Doubled(5, 5), (4,), "Doubled '2' is a subclass"),
        (Scale(), (4,), "Scale '2' has parameters, and BackPACK has no rule"),
        (persample.FrozenBatchNorm(5), (4,), "FrozenBatchNorm '2' is of a class that BackPACK does not know.*'rules'"),
    ],
)
def test_refused_by_extend(layer: nn.Module, shape: tuple[int, ...], reason: str) -> None:
    assert_refused("backpack (extend)", mlp(layer), reals(3, *shape), reason)


@pytest.mark.parametrize(
    ("make", "shape", "reason"),
    [
        (lambda: tie(mlp(nn.Linear(5, 5), nn.Linear(5, 5)), **{"3.weight": "2.weight"}), (4,), "Linear '2' is used by"),
        (lambda: net(lambda m, x: m.a(m.a(x)), a=nn.Linear(4, 4)), (4,), "Linear 'a' is used by more than one call"),
        (lambda: nn.Sequential(nn.Conv1d(2, 3, 3, padding="same")), (2, 5), "has padding='same'"),
        (lambda: nn.Sequential(nn.ConvTranspose1d(2, 3, 3, 2, output_padding=1)), (2, 5), "has output_padding"),
        (lambda: net(lambda m, x: m.output(x), output=nn.Linear(4, 2)), (4,), "an attribute 'output'.* rename it"),
    ],
)
def test_uses_that_extend_gets_wrong(make: Callable[[], nn.Module], shape: tuple[int, ...], reason: str) -> None:
    assert_refused("backpack (extend)", make().double(), reals(3, *shape), reason)


class Borrowing(nn.Module):
    """Uses a parameter of another module beside its own."""

    def __init__(self, lender: nn.Linear) -> None:
        super().__init__()
        self.scale, self.borrowed = nn.Parameter(torch.randn(5)), [lender.bias]

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x * self.borrowed[0]


def lent() -> nn.Module:
    lender = nn.Linear(4, 5)
    return nn.Sequential(lender, nn.Tanh(), Borrowing(lender))


class Dropping(Scale):
    def forward(self, x: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        return F.dropout(super().forward(x, shift))


class Buffered(Scale):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.tensor(0.5))


class Solving(nn.Module):
    """PyTorch's vmap takes the vectors of all samples for the columns of one matrix here."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(4) + 0.1 * torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.solve(self.matrix, x.unsqueeze(-1)).squeeze(-1)


def with_own_forward() -> nn.Module:
    layer = Scale()
    layer.forward = lambda x: 2 * x * layer.scale  # type: ignore[assignment, method-assign, misc]
    return mlp(layer)


def with_activations() -> nn.Module:
    layer = Scale()
    layer.activations = []  # type: ignore[assignment]
    return mlp(layer)


@pytest.mark.parametrize(
    ("make", "shape", "reason"),
    [
        (
            lambda: net(lambda m, x: m.a(x)[0], a=nn.LSTM(4, 5)),
            (3, 4),
            "LSTM 'a' cannot be run by.*use opacus.layers.DP",
        ),
        (
            lambda: net(lambda m, x: m.a(x, x), a=nn.Bilinear(4, 4, 2)),
            (4,),
            "Bilinear 'a' was called with something other than one positional",
        ),
        (
            lambda: net(lambda m, x: m.s(m.a(x), 3.0), a=nn.Linear(4, 5), s=Scale()),
            (4,),
            "Scale 's' was called with something",
        ),
        (lambda: mlp(Buffered()), (4,), "Buffered '2' has parameters and buffers"),
        (lambda: mlp(nn.BatchNorm1d(5).eval()), (4,), "BatchNorm1d '2' has parameters and buffers"),
        (lambda: mlp(Scale()).eval(), (4,), "Scale '2' is in eval mode.*call .train"),
        (lambda: mlp(Dropping()), (4,), "vmap: called random operation"),
        (lent, (4,), "Borrowing '2' uses parameter '0.bias' of another module"),
        (with_own_forward, (4,), "Scale '2' has its own forward"),
        (with_activations, (4,), "Scale '2' has an attribute 'activations'.*rename it"),
        (
            lambda: nn.Sequential(nn.Linear(4, 4), Solving()),
            (4,),
            "Solving '1' has no grad sampler.*something different",
        ),
    ],
)
def test_refused_by_grad_sample_module(make: Callable[[], nn.Module], shape: tuple[int, ...], reason: str) -> None:
    assert_refused("opacus (module)", make().double(), reals(3, *shape), f"(?s){reason}")


def test_images_that_are_not_contiguous_are_left_to_the_rules() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 2, 2)).double()
    for images in (reals(3, 2, 4, 4).to(memory_format=torch.channels_last), reals(3, 2, 5, 4).mT):
        assert_refused("opacus (module)", model, images, "Conv2d '0' was called with an image that is not contiguous")
        assert_served("opacus", model, images)


@pytest.mark.parametrize("method", ["moments", "per_sample"])
def test_the_self_check_finds_positions_that_are_as_many_as_the_samples(own: str, method: str) -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        output: Tensor = m.head(m.tokens(x) + m.positions(torch.arange(x.shape[1])))
        return output

    parts = {"tokens": nn.Embedding(6, 4), "positions": nn.Embedding(5, 4), "head": nn.Linear(4, 2)}
    model = Net(forward, **parts)
    for size in (3, 5):
        source = persample.make_source(own, model, squared_error)
        with pytest.raises(PersampleError, match=r"shape \(5,|wrong on this model"):
            getattr(source, method)(torch.randint(6, (size, 5)), torch.randn(size, 5, 2))


@pytest.mark.parametrize("machinery", ["own", "auto"])
def test_autocast_is_left_to_the_rules(peer: str, machinery: str) -> None:
    source = persample.make_source(
        peer, mlp().float(), squared_error, machinery=OWN[peer] if machinery == "own" else "auto"
    )
    batch = torch.randn(3, 4), torch.randn(3, 2)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        if machinery == "own":
            with pytest.raises(UnsupportedModelError, match=r"'0.weight' in torch.bfloat16.*machinery='rules'"):
                source.moments(*batch)
        else:
            source.moments(*batch)
            assert source.ran == "rules"
    source.moments(*batch)
    assert source.ran == OWN[peer]


# What a call leaves behind, and what the next one finds.


def test_it_sees_what_became_of_the_model(peer: str, own: str) -> None:
    model = mlp(Scale()) if peer == "opacus" else mlp(nn.Linear(5, 5))
    inputs, targets = reals(4, 4), reals(4, 2)
    source = persample.make_source(own, model, squared_error, check="never")

    def change_attribute() -> None:
        model[2].times = 3.0  # type: ignore[assignment]

    def replace_layers() -> None:
        model[0], model[1] = nn.Linear(4, 5).double(), nn.Sigmoid()

    def replace_parameter() -> None:
        model[3].weight = nn.Parameter(reals(2, 5))

    def add_dropout() -> None:
        model.append(nn.Dropout(0.5))

    def switch_it_off() -> None:
        model[-1].eval()

    def freeze() -> None:
        model[0].requires_grad_(False)

    changes = [change_attribute, replace_layers, replace_parameter, add_dropout, switch_it_off, freeze]
    for change in changes:
        change()
        torch.manual_seed(3)
        found = source.per_sample(inputs, targets)
        torch.manual_seed(3)
        assert_close(found, persample.make_source("loop", model, squared_error).per_sample(inputs, targets))
    handle = model[0].register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(UnsupportedModelError, match="Linear '0' has hooks"):
        source.per_sample(inputs, targets)
    handle.remove()
    source.per_sample(inputs, targets)


def test_what_the_user_has_put_on_the_parameters_stays(own: str) -> None:
    model = mlp()
    for parameter in model.parameters():
        for name in ("grad_sample", "_current_grad_sample", "_forward_counter", "grad_batch", "sum_grad_squared"):
            setattr(parameter, name, "mine")
    assert_served(own, model, reals(3, 4))


class Warned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        warnings.warn("of the user", UserWarning, stacklevel=1)
        return x


@pytest.mark.parametrize("fails", ["nowhere", "in the loss", "by Ctrl-C"])
def test_global_settings_stay(own: str, fails: str) -> None:
    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        if fails != "nowhere":
            raise ZeroDivisionError if fails == "in the loss" else KeyboardInterrupt
        return squared_error(outputs, targets)

    def settings() -> Any:
        of_backpack = {name: getattr(CTX, name) for name in ("active_exts", "debug", "extension_hook", "retain_graph")}
        return of_backpack, list(CTX.hook_handles), disable.store_io, torch.backends.cudnn.deterministic

    model, inputs, targets = mlp(Warned()), reals(3, 4), reals(3, 2)
    before = settings()
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        filters = list(warnings.filters)
        for _ in range(3):
            try:
                with no_trace(model, inputs, targets):
                    persample.make_source(own, model, loss_fn, check="never").moments(inputs, targets)
            except (ZeroDivisionError, KeyboardInterrupt):
                assert fails != "nowhere"
            else:
                assert fails == "nowhere"
        assert list(warnings.filters) == filters
    assert [str(warning.message) for warning in shown] == ["of the user"], "once, as without us"
    assert settings() == before


def test_warnings_may_be_errors() -> None:
    code = """
import torch
from torch import nn
import persample
model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3).requires_grad_(False), nn.Linear(3, 2))
for name in ("opacus (module)", "backpack (extend)"):
    source = persample.make_source(name, model, lambda outputs, targets: outputs.square().sum(1))
    source.moments(torch.randn(5, 4), None)
"""
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True)


def test_the_context_of_backpack_is_one_for_all() -> None:
    model, inputs, targets = mlp(), reals(3, 4), reals(3, 2)
    expected = persample.make_source("loop", model, squared_error).moments(inputs, targets)
    source = persample.make_source("backpack", model, squared_error)
    for context in (backpack(BatchGrad()), disable()):
        with context:
            active = CTX.get_active_exts()
            assert_close(source.moments(inputs, targets).second_moment, expected.second_moment)
            assert source.ran == "rules"
            with pytest.raises(UnsupportedModelError, match=r"outside `with backpack.*machinery='rules'"):
                persample.make_source("backpack (extend)", model, squared_error).moments(inputs, targets)
            assert CTX.get_active_exts() is active
        source.moments(inputs, targets)
        assert source.ran == "extend"


def test_threads_with_each_machinery(peer: str, own: str) -> None:
    failures: list[BaseException] = []

    def work(name: str) -> None:
        try:
            model, inputs, targets = mlp(nn.Dropout(0.0)), reals(3, 4), reals(3, 2)
            expected = persample.make_source("loop", model, squared_error).moments(inputs, targets)
            for _ in range(8):
                found = persample.make_source(name, model, squared_error, check="never").moments(inputs, targets)
                assert_close(found.second_moment, expected.second_moment)
        except BaseException as failure:  # noqa: BLE001 - the main thread raises it
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(name,)) for name in (own, own, peer, f"{peer} (rules)")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
