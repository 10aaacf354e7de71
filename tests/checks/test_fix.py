"""`fix`: a copy without mixing BatchNorms, which keeps everything else, and the given model as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
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


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), (3,)),
    "1d on a sequence": (lambda: nn.Sequential(nn.Conv1d(3, 8, 2), nn.BatchNorm1d(8), nn.Conv1d(8, 2, 2)), (3, 5)),
    "2d": (lambda: nn.Sequential(nn.Conv2d(3, 8, 2), nn.BatchNorm2d(8), nn.ReLU()), (3, 4, 4)),
    "3d": (lambda: nn.Sequential(nn.Conv3d(3, 8, 2), nn.BatchNorm3d(8), nn.ReLU()), (3, 3, 3, 3)),
    "synchronised": (lambda: nn.Sequential(nn.Conv2d(3, 8, 2), nn.SyncBatchNorm(8)), (3, 4, 4)),
    "subclass": (lambda: nn.Sequential(nn.Conv2d(3, 8, 2), Subclass(8)), (3, 4, 4)),
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
        (WithActivation(8), "group_norm", r"WithActivation '0' has a forward of its own"),
        (WithActivation(8), "frozen", r"WithActivation '0' has a forward of its own"),
        (with_own_forward(), "group_norm", "has a forward of its own"),
        (parametrized(), "group_norm", "other parameters than its class says"),
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
