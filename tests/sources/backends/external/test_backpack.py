"""BackPACK: the same numbers as from its own machinery, and no number where its rules are wrong."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import persample

from ...agreement import assert_refused, assert_served, squared_error, targets_for

pytest.importorskip("backpack")

from backpack import backpack, extend
from backpack.context import CTX
from backpack.extensions import BatchGrad, SumGradSquared


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def reals(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10), nn.Tanh(), nn.Linear(10, 3)
    ).double()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_gives_the_numbers_of_backpack_itself() -> None:
    model, inputs = convnet(), reals(5, 1, 8, 8)
    targets = targets_for(model, inputs)
    extended = extend(copy.deepcopy(model))
    with backpack(BatchGrad(), SumGradSquared()):
        squared_error(extended(inputs), targets).sum().backward()
    source = persample.make_source("backpack", model, squared_error)
    moments, rows = source.moments(inputs, targets), source.per_sample(inputs, targets)
    for name, parameter in extended.named_parameters():
        torch.testing.assert_close(rows[name], parameter.grad_batch, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(5 * moments.second_moment[name], parameter.sum_grad_squared, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(5 * moments.mean[name], parameter.grad, rtol=1e-12, atol=1e-12)


def test_leaves_the_global_state_of_backpack_alone() -> None:
    before = dict(vars(CTX)), list(CTX.hook_handles)
    assert_served("backpack", convnet(), reals(2, 1, 8, 8))
    assert (dict(vars(CTX)), list(CTX.hook_handles)) == before


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_serves_a_model_that_the_user_has_extended() -> None:
    model = extend(convnet())
    assert_served("backpack", model, reals(2, 1, 8, 8))
    inputs = reals(2, 1, 8, 8)
    with backpack(BatchGrad()):
        squared_error(model(inputs), targets_for(convnet(), inputs)).sum().backward()
    assert model[0].weight.grad_batch.shape == (2, 4, 1, 3, 3)


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2},
        {"stride": 3, "padding": 2},
        {"padding": "valid", "dilation": 2},
        {"groups": 2, "bias": False},
        {"stride": 2, "padding": 1, "dilation": 2, "groups": 2},
    ],
)
def test_serves_convolutions(n: int, options: dict[str, object]) -> None:
    assert_served("backpack", CONVOLUTIONS[n - 1](4, 4, 3, **options).double(), reals(3, 4, *(8, 7, 6)[:n]))
    if options.get("padding") != "valid":
        assert_served("backpack", TRANSPOSED[n - 1](4, 4, 3, **options).double(), reals(3, 4, *(4, 3, 3)[:n]))


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"padding": "same"}, "padding='same'"),
        ({"padding": 1, "padding_mode": "circular"}, "padding_mode='circular'"),
        ({"padding": 1, "padding_mode": "reflect"}, "padding_mode='reflect'"),
        ({"padding": 1, "padding_mode": "replicate"}, "padding_mode='replicate'"),
    ],
)
def test_refuses_paddings_that_backpack_takes_for_others(n: int, options: dict[str, object], match: str) -> None:
    model = nn.Sequential(CONVOLUTIONS[n - 1](2, 2, 3, **options)).double()
    assert_refused("backpack", model, reals(3, 2, *(6, 5, 4)[:n]), f"'0' has {match}")


@pytest.mark.parametrize("n", [1, 2, 3])
def test_refuses_output_padding(n: int) -> None:
    layer = TRANSPOSED[n - 1](2, 2, 3, stride=2, output_padding=1).double()
    assert_refused("backpack", layer, reals(3, 2, *(4, 3, 3)[:n]), "output_padding")


def test_refuses_an_output_size_that_is_chosen_in_the_call() -> None:
    class Upsampling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.ConvTranspose2d(2, 2, 3, stride=2).double()

        def forward(self, x: Tensor, size: int) -> Tensor:
            output: Tensor = self.layer(x, output_size=[size, size])
            return output

    assert_served("backpack", Upsampling(), (reals(3, 2, 4, 4), 9))
    assert_refused("backpack", Upsampling(), (reals(3, 2, 4, 4), 10), "BackPACK cannot handle ConvTranspose2d 'layer'")


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.LayerNorm(4), (3, 4)),
        (nn.GroupNorm(2, 4), (3, 4, 5)),
        (nn.RMSNorm(4), (3, 4)),
        (nn.InstanceNorm1d(4, affine=True), (3, 4, 5)),
        (nn.PReLU(), (3, 4)),
        (nn.Bilinear(4, 4, 2), (3, 4)),
    ],
)
def test_refuses_layers_without_a_rule_instead_of_leaving_them_out(layer: nn.Module, shape: tuple[int, ...]) -> None:
    inputs = (reals(*shape), reals(*shape)) if isinstance(layer, nn.Bilinear) else reals(*shape)
    assert_refused("backpack", layer.double(), inputs, f"{type(layer).__name__}.* BackPACK has no rule")
    layer.requires_grad_(False)
    assert_served("backpack", layer, inputs)


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (3, 4, 2, 3), (3, 4, 2, 3, 2)])
def test_serves_batch_norm_in_eval_mode(shape: tuple[int, ...]) -> None:
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    layer = kind(4).double()
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    assert_served("backpack", layer.eval(), reals(*shape))


def test_serves_embeddings_in_the_default_dtype_only() -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 3)).double()
    tokens = torch.tensor([[1, 2, 1], [5, 5, 5], [0, 1, 2]])
    assert_refused("backpack", model, tokens, "torch.float64, but BackPACK computes embeddings in the default dtype")
    with default_dtype(torch.float64):
        assert_served("backpack", model, tokens)
        assert_served("backpack", nn.Embedding(6, 4), torch.tensor([1, 1, 5]))
        assert_refused("backpack", nn.Embedding(6, 4, padding_idx=1), tokens, "padding_idx=1")
        assert_refused("backpack", nn.Embedding(6, 4, sparse=True), tokens, "sparse=True")


def test_second_moments_on_sequences_need_no_table_of_all_positions() -> None:
    # BackPACK's own contraction would hold 8·400·200·200 numbers here, 512 MB, where opt_einsum is missing.
    enabled = torch.backends.opt_einsum.enabled
    model, inputs = nn.Linear(200, 200), torch.randn(8, 400, 200)
    source = persample.make_source("backpack", model, squared_error, check="never")
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.backends.opt_einsum.enabled = False
        try:
            source.moments(inputs, torch.zeros(8, 400, 200))
        finally:
            torch.backends.opt_einsum.enabled = enabled
    assert max(event.cpu_memory_usage for event in profile.events()) < 50e6
