"""`fix`: a copy without mixing BatchNorms, which keeps everything else, and the given model as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import persample
from persample.errors import OptionError, UnsupportedModelError


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def loss_fn(outputs: Tensor, targets: Any = None) -> Tensor:
    flat = outputs.flatten(1)
    return (flat.sin() * torch.linspace(-1, 1, flat.shape[1], dtype=flat.dtype)).sum(1)


def with_statistics(model: nn.Module) -> nn.Module:
    """Statistics and affine parameters away from those of initialisation."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


class Subclass(nn.BatchNorm2d):
    """Computes what its base computes."""


class WithActivation(nn.BatchNorm2d):
    """Computes something else than its base, as some model libraries do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class WithChildren(nn.BatchNorm2d):
    """Has a dropout and an activation behind its batch norm, as BatchNormAct2d of timm, whose forward this is."""

    def __init__(self, channels: int, **kwargs: Any) -> None:
        super().__init__(channels, **kwargs)
        self.drop, self.act = nn.Identity(), nn.LeakyReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, "expected 4D input")
        factor = self.momentum or 0.0
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        x = F.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            factor,
            self.eps,
        )
        return self.act(self.drop(x))


class OfTheBase(nn.SyncBatchNorm):
    """Leaves the batch norm to its base, and calls what it has."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return self.act(x) if hasattr(self, "act") else x


class OfVectors(nn.BatchNorm1d):
    """Takes sequences only, has children that hold parameters, and calls the last first."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.norm, self.second, self.none = nn.Conv1d(channels, 3, 2), nn.Conv1d(channels, channels, 1), None

    def forward(self, x: Tensor) -> Tensor:
        _, channels, positions = x.shape
        assert (channels, positions > 1) == (self.num_features, True)
        return self.norm(self.second(super().forward(x)))


def of_the_base() -> nn.Module:
    norm = OfTheBase(8)
    norm.act = nn.Tanh()
    return norm


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), (3,)),
    "1d on a sequence": (lambda: nn.Sequential(nn.Conv1d(3, 8, 2), nn.BatchNorm1d(8), nn.Conv1d(8, 2, 2)), (3, 5)),
    "2d": (lambda: nn.Sequential(nn.Conv2d(3, 8, 2), nn.BatchNorm2d(8), nn.ReLU()), (3, 4, 4)),
    "3d": (lambda: nn.Sequential(nn.Conv3d(3, 8, 2), nn.BatchNorm3d(8), nn.ReLU()), (3, 3, 3, 3)),
    "synchronised": (lambda: nn.Sequential(nn.Conv2d(3, 8, 2), nn.SyncBatchNorm(8)), (3, 4, 4)),
    "subclass": (lambda: nn.Sequential(nn.Conv2d(3, 8, 2), Subclass(8)), (3, 4, 4)),
    "children behind": (lambda: nn.Sequential(nn.Conv2d(3, 8, 2), WithChildren(8), nn.Conv2d(8, 2, 2)), (3, 4, 4)),
    "one child behind": (lambda: nn.Sequential(nn.Conv2d(3, 8, 2), of_the_base()), (3, 4, 4)),
    "no child behind": (lambda: nn.Sequential(nn.Conv2d(3, 8, 2), OfTheBase(8)), (3, 4, 4)),
    "parameters behind": (lambda: nn.Sequential(nn.Conv1d(3, 8, 2), OfVectors(8)), (3, 5)),
    "without scale and shift": (lambda: nn.Sequential(nn.Conv2d(3, 8, 2), nn.BatchNorm2d(8, affine=False)), (3, 4, 4)),
    "the model itself": (lambda: nn.BatchNorm2d(8), (8, 3, 3)),
    "nested": (
        lambda: nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 2), nn.BatchNorm2d(8)), nn.BatchNorm2d(8)),
        (3, 4, 4),
    ),
}


def affine_parameters(model: nn.Module) -> list[nn.Parameter]:
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm | persample.FrozenBatchNorm)]
    return [p for norm in norms for p in norm.parameters()]


@pytest.mark.parametrize("batch_norm", ["group_norm", "frozen"])
@pytest.mark.parametrize("name", MODELS)
def test_what_was_refused_is_served_exactly_afterwards(
    backend: str, name: str, batch_norm: Any, per_sample_truth: Any, no_trace: Any
) -> None:
    build, shape = MODELS[name]
    model, inputs = with_statistics(build()).double(), torch.randn(4, *shape).double()
    with pytest.raises(UnsupportedModelError, match=r"persample\.fix"):
        persample.make_source(backend, model, loss_fn).moments(inputs, None)
    with no_trace(model):
        fixed, changes = persample.fix(model, batch_norm)
    assert changes
    fixed.train()
    source = persample.make_source(backend, fixed, loss_fn)
    serves = {
        "group_norm": ("loop", "hooks", "fused", "vmap", "vjp", "opacus"),
        "frozen": ("loop", "hooks", "fused", "vmap", "vjp", "backpack"),
    }
    truth = per_sample_truth(fixed, loss_fn, inputs, None).gradients
    if backend.partition(" ")[0] not in serves[batch_norm] and affine_parameters(fixed):
        with pytest.raises(UnsupportedModelError):
            source.moments(inputs, None)
    else:
        moments = source.moments(inputs, None)
        torch.testing.assert_close(source.per_sample(inputs, None), truth, rtol=1e-9, atol=1e-11)
        squares = {key: g.square().mean(0) for key, g in truth.items()}
        torch.testing.assert_close(dict(moments.second_moment), squares, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", MODELS)
def test_frozen_computes_what_eval_mode_computes(name: str) -> None:
    build, shape = MODELS[name]
    model, inputs = with_statistics(build()), torch.randn(4, *shape)
    fixed = persample.fix(model, "frozen").model.train()
    state = copy.deepcopy(fixed.state_dict())
    torch.testing.assert_close(fixed(inputs), model.eval()(inputs), rtol=0, atol=0)
    assert all(torch.equal(value, state[key]) for key, value in fixed.state_dict().items())
    if "behind" not in name or name.startswith("no "):
        model.load_state_dict(state)
        fixed.load_state_dict(model.state_dict())


def test_group_norm_normalises_each_sample_with_the_scales_and_shifts_of_the_model() -> None:
    model, inputs = with_statistics(nn.Sequential(nn.BatchNorm2d(8, eps=0.1))), torch.randn(4, 8, 3, 3)
    fixed = persample.fix(model).model
    groups = inputs.view(4, 2, -1)
    normalised = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, keepdim=True, correction=0) + 0.1).sqrt()
    scale, shift = (p.view(8, 1, 1) for p in (model[0].weight, model[0].bias))
    torch.testing.assert_close(fixed(inputs), normalised.view_as(inputs) * scale + shift)


@pytest.mark.parametrize("batch_norm", ["group_norm", "frozen"])
def test_keeps_what_is_not_replaced(batch_norm: Any) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 2), nn.BatchNorm2d(8, dtype=torch.float64, eps=0.5), nn.Sequential(nn.BatchNorm2d(8)), nn.ReLU()
    )
    model[1].weight.requires_grad_(False)
    model[2].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[2][0].bias = model[0].bias  # tied
    model[2][0].register_forward_hook(lambda module, args, output: 2 * output)
    fixed, changes = persample.fix(model, batch_norm)
    assert [change.paths for change in changes] == [("1",), ("2.0",)]
    assert fixed[1].weight.dtype == torch.float64
    assert fixed[1].eps == 0.5
    assert (fixed[1].weight.requires_grad, fixed[1].bias.requires_grad) == (False, True)
    assert fixed[2][0].bias is fixed[0].bias
    assert fixed.training
    assert not fixed[2].training
    assert not fixed[2][0].training
    assert fixed[1].training == (batch_norm == "group_norm")
    assert len(fixed[2][0]._forward_hooks) == 1
    parameters = dict(model.named_parameters())
    assert list(parameters) == [name for name, _ in fixed.named_parameters()]
    for name, p in fixed.named_parameters():
        assert torch.equal(p, parameters[name])
        assert p is not parameters[name]


@pytest.mark.parametrize("batch_norm", ["group_norm", "frozen"])
def test_one_module_at_two_places_stays_one(batch_norm: Any) -> None:
    norm = nn.BatchNorm2d(8)
    model = nn.ModuleDict({"first": nn.Sequential(norm), "second": norm, "other": nn.BatchNorm2d(8)})
    fixed, changes = persample.fix(model, batch_norm)
    assert fixed["first"][0] is fixed["second"]
    assert fixed["second"] is not fixed["other"]
    assert [change.paths for change in changes] == [("first.0", "second"), ("other",)]
    assert model["second"] is norm


@pytest.mark.parametrize("batch_norm", ["group_norm", "frozen"])
def test_children_stand_behind_the_replacement_as_they_were(batch_norm: Any) -> None:
    norm, calls = WithChildren(8, eps=0.1), []
    norm.drop = nn.Dropout(0.5)
    norm.drop.register_forward_hook(lambda module, args, output: calls.append("drop"))
    norm.register_forward_hook(lambda module, args, output: output + 1)
    norm.act.eval()
    fixed, changes = persample.fix(nn.Sequential(norm), batch_norm)
    assert calls == []
    row = fixed[0]
    assert [name for name, _ in row.named_children()] == ["norm", "drop", "act"]
    assert [m.training for m in row.modules()] == [True, batch_norm == "group_norm", True, False]
    assert changes[0].paths == ("0",)
    assert "LeakyReLU" in changes[0].after
    inputs = torch.randn(4, 8, 3, 3)
    torch.manual_seed(1)
    found = fixed(inputs)
    torch.manual_seed(1)
    normalised = F.group_norm(inputs, 2, eps=0.1) if batch_norm == "group_norm" else inputs / 1.1**0.5
    torch.testing.assert_close(found, F.leaky_relu(F.dropout(normalised, 0.5)) + 1)
    assert calls == ["drop"]
    assert fixed.train()[0].drop.training
    assert not fixed.eval()[0].drop.training


def behind(then: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> nn.Module:
    """A BatchNorm with a child `act`; `then` makes its output of itself, its input and the result of the batch norm."""

    class Own(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return then(self, x, super().forward(x))

    norm = Own(8)
    norm.act = nn.ReLU()
    return norm


def without_gradient(norm: Any, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return norm.act(y)


def other_scale(norm: Any, x: Tensor, y: Tensor) -> Tensor:
    y = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight + 1, norm.bias, norm.training, 0.1, norm.eps)
    return norm.act(y)


def other_eps(norm: Any, x: Tensor, y: Tensor) -> Tensor:
    y = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, 0.1, 0.5)
    return norm.act(y)


def always_of_the_batch(norm: Any, x: Tensor, y: Tensor) -> Tensor:
    return norm.act(F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, True))


UNKNOWN: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "clamped, of which a small batch would tell nothing": lambda norm, x, y: norm.act(y.clamp(max=1e4)),
    "clamped in place": lambda norm, x, y: norm.act(y.clamp_(max=1e4)),
    "clamped afterwards": lambda norm, x, y: norm.act(y).clamp_(max=1e4),
    "beside": lambda norm, x, y: norm.act(y) + 0 * x,
    "before": lambda norm, x, y: type(norm).__base__.forward(norm, norm.act(x)),  # type: ignore[misc, union-attr]
    "in training mode only": lambda norm, x, y: norm.act(y) if norm.training else y,
    "twice": lambda norm, x, y: norm.act(norm.act(y)),
    "not at all": lambda norm, x, y: y,
    "called with more": lambda norm, x, y: norm.act(y, x),
    "a pair": lambda norm, x, y: (norm.act(y), y),  # type: ignore[return-value, dict-item]
    "detached": lambda norm, x, y: norm.act(y.detach()),
    "without gradient": without_gradient,
    "of another scale": other_scale,
    "of another eps": other_eps,
    "of the batch in eval mode": always_of_the_batch,
}


@pytest.mark.parametrize("batch_norm", ["group_norm", "frozen"])
@pytest.mark.parametrize("name", UNKNOWN)
def test_other_forwards_are_refused(name: str, batch_norm: Any, no_trace: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 2), behind(UNKNOWN[name]))
    with pytest.raises(UnsupportedModelError, match=r"Own '1' has its own forward.*by hand"), no_trace(model):
        persample.fix(model, batch_norm)


def test_children_of_a_plain_batch_norm_are_not_dropped() -> None:
    norm = nn.BatchNorm2d(8)
    norm.extra = nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match="has its own forward"):
        persample.fix(norm)


@pytest.mark.parametrize("batch_norm", ["group_norm", "frozen"])
@pytest.mark.parametrize("around", [lambda m: m, nn.Sequential])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, WithChildren])
def test_a_batch_norm_that_was_compiled_itself_is_replaced(
    norm: Callable[..., nn.Module], around: Callable[..., nn.Module], batch_norm: Any
) -> None:
    fixed = persample.fix(around(torch.compile(norm(8), backend="eager")), batch_norm).model
    inputs = torch.randn(4, 8, 3, 3)
    torch.testing.assert_close(fixed(inputs.clone())[:1], fixed(inputs[:1].clone()))


def test_the_changes_can_be_read() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.BatchNorm1d(8))
    fixed = persample.fix(model)
    assert str(fixed) == f"1: {model[1]} → {fixed.model[1]}\n2: {model[2]} → {fixed.model[2]}"
    assert str(fixed.model[1]).startswith("GroupNorm(2, 8, eps=1e-05")
    assert str(persample.fix(nn.Linear(3, 8))) == "nothing to change"
    assert str(persample.fix(nn.BatchNorm2d(8))).startswith("the model: BatchNorm2d")


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(1, 1), (3, 1), (6, 1), (7, 1), (8, 2), (10, 2), (16, 4), (48, 12), (64, 16), (96, 24), (128, 32), (2048, 32)],
)
def test_default_groups(channels: int, groups: int) -> None:
    assert persample.fix(nn.BatchNorm2d(channels)).model.num_groups == groups


def test_chosen_groups() -> None:
    model = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(12))
    assert [norm.num_groups for norm in persample.fix(model, groups=4).model] == [4, 4]
    with pytest.raises(
        OptionError, match=r"groups=8 does not divide the 12 channels of BatchNorm2d '1'.*1, 2, 3, 4, 6, 12"
    ):
        persample.fix(model, groups=8)
    with pytest.raises(OptionError, match="groups=0"):
        persample.fix(model, groups=0)
    with pytest.raises(OptionError, match="'group_norm' only"):
        persample.fix(model, "frozen", groups=4)
    with pytest.raises(OptionError, match=r"batch_norm='layer_norm'.*'group_norm', 'frozen'"):
        persample.fix(model, "layer_norm")  # type: ignore[arg-type]


def with_own_forward() -> nn.Module:
    norm = nn.BatchNorm2d(8)
    norm.forward = lambda x: x  # type: ignore[method-assign]
    return norm


def parametrized() -> nn.Module:
    norm = nn.BatchNorm2d(8)
    parametrize.register_parametrization(norm, "weight", nn.Softplus())
    return norm


@pytest.mark.parametrize(
    ("norm", "batch_norm", "message"),
    [
        (nn.LazyBatchNorm2d(), "group_norm", r"'0' is not initialised.*forward pass"),
        (nn.LazyBatchNorm2d(), "frozen", r"'0' is not initialised.*forward pass"),
        (WithActivation(8), "group_norm", r"WithActivation '0' has its own forward"),
        (WithActivation(8), "frozen", r"WithActivation '0' has its own forward"),
        (with_own_forward(), "group_norm", "has its own forward"),
        (parametrized(), "group_norm", "weight that is not a parameter"),
        (nn.BatchNorm2d(8, track_running_stats=False), "frozen", "no running statistics.*group_norm"),
        (nn.BatchNorm1d(1), "group_norm", "single feature.*frozen"),
    ],
)
def test_what_cannot_be_replaced_is_refused(norm: nn.Module, batch_norm: Any, message: str, no_trace: Any) -> None:
    model = nn.Sequential(norm)
    with pytest.raises(UnsupportedModelError, match=message), no_trace(model):
        persample.fix(model, batch_norm)


def test_frozen_batch_norm_stays_frozen() -> None:
    norm = persample.FrozenBatchNorm(3)
    assert not norm.training
    assert not nn.Sequential(norm).train()[0].training
    norm(torch.randn(5, 3))
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_mean, torch.zeros(3))
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        norm(torch.randn(3))


def test_a_model_that_cannot_be_copied_is_refused(no_trace: Any) -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4))  # type: ignore[no-untyped-call]
    model(torch.randn(2, 3))
    with (
        pytest.raises(UnsupportedModelError, match=r"\(Sequential\) cannot be copied.*parametrizations"),
        no_trace(model),
    ):
        persample.fix(model)
