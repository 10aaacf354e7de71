"""Opacus: the same numbers as from GradSampleModule, and no number where its rules are wrong."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import persample

from ...agreement import assert_refused, assert_served, squared_error, targets_for

pytest.importorskip("opacus")

from opacus.grad_sample import GradSampleModule, register_grad_sampler
from opacus.layers import DPGRU, DPLSTM, DPRNN


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def reals(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10),
        nn.LayerNorm(10), nn.Linear(10, 3),
    ).double()  # fmt: skip


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_gives_the_numbers_of_grad_sample_module() -> None:
    model, inputs = convnet(), reals(5, 1, 8, 8)
    targets = targets_for(model, inputs)
    wrapped = GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    squared_error(wrapped(inputs), targets).sum().backward()
    rows = persample.make_source("opacus", model, squared_error).per_sample(inputs, targets)
    assert [f"_module.{name}" for name in rows] == [name for name, _ in wrapped.named_parameters()]
    for g, parameter in zip(rows.values(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(g, parameter.grad_sample, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_serves_a_model_that_the_user_has_wrapped() -> None:
    wrapped = GradSampleModule(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double())
    assert_served("opacus", wrapped, reals(3, 4))
    inputs = reals(3, 4)
    wrapped(inputs).square().sum().backward()
    assert next(wrapped.parameters()).grad_sample.shape == (3, 4, 4)


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2},
        {"stride": 3, "padding": 2},
        {"padding": "valid", "dilation": 2},
        {"padding": "same", "dilation": 2},
        pytest.param({"padding": "same", "kernel_size": 2}, marks=pytest.mark.filterwarnings("ignore:Using padding")),
        {"groups": 2, "bias": False},
        {"stride": 2, "padding": 1, "dilation": 2, "groups": 2},
    ],
)
def test_serves_convolutions(n: int, options: dict[str, Any]) -> None:
    options = {"kernel_size": 3, **options}
    layer = CONVOLUTIONS[n - 1](4, 4, **options).double()
    inputs = reals(3, 4, *(8, 7, 6)[:n])
    assert_served("opacus", layer, inputs)
    assert_served("opacus", layer, reals(3, *(8, 7, 6)[:n], 4).movedim(-1, 1))
    if not isinstance(options.get("padding"), str):
        layer = TRANSPOSED[n - 1](4, 4, **options, output_padding=int(options.get("stride", 1) > 1)).double()
        assert_served("opacus", layer, reals(3, 4, *(4, 3, 3)[:n]))


@pytest.mark.parametrize("padding", [0, 1])
def test_serves_convolutions_in_channels_last(padding: int) -> None:
    # The rule of Opacus reads these strides wrongly, which gives wrong numbers without a word.
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=padding), nn.ReLU(), nn.Conv2d(4, 2, 3)).double()
    inputs = reals(2, 3, 6, 6).to(memory_format=torch.channels_last)
    assert_served("opacus", model, inputs)
    assert_served("opacus", model.to(memory_format=torch.channels_last), inputs)
    assert_served("opacus", nn.Conv2d(3, 4, 1, padding=1).double(), inputs[..., :1, :1])


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_refuses_paddings_that_opacus_takes_for_zeros(n: int, mode: Any) -> None:
    model = nn.Sequential(CONVOLUTIONS[n - 1](2, 2, 3, padding=1, padding_mode=mode)).double()
    assert_refused("opacus", model, reals(3, 2, *(6, 5, 4)[:n]), f"'0' has padding_mode='{mode}'")


class Upsampling(nn.Module):
    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.layer = nn.ConvTranspose2d(2, 2, kernel, stride=2).double()

    def forward(self, x: Tensor, size: int) -> Tensor:
        output: Tensor = self.layer(x, output_size=[size, size])
        return output


def test_refuses_an_output_size_that_is_chosen_in_the_call() -> None:
    assert_served("opacus", Upsampling(3), (reals(3, 2, 4, 4), 9))
    assert_refused("opacus", Upsampling(3), (reals(3, 2, 4, 4), 10), "output_size")
    # One output position in each direction, which would be broadcast to the two that were asked for.
    assert_refused("opacus", Upsampling(1), (reals(3, 2, 1, 1), 2), "output_size")


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.LayerNorm(4), (3, 4)),
        (nn.LayerNorm((5, 4), eps=0.1), (3, 2, 5, 4)),
        (nn.GroupNorm(2, 4), (3, 4, 2, 3)),
        (nn.RMSNorm(4), (3, 5, 4)),
        (nn.RMSNorm((5, 4), eps=0.1), (3, 5, 4)),
        (nn.InstanceNorm1d(4, affine=True), (3, 4, 5)),
        (nn.InstanceNorm2d(4, affine=True).eval(), (3, 4, 2, 3)),
        (nn.InstanceNorm3d(4, affine=True), (3, 4, 2, 3, 2)),
        (nn.PReLU(), (3, 4)),
        (nn.PReLU(4), (3, 4, 5)),
    ],
)
def test_serves_normalisations_and_prelu(layer: nn.Module, shape: tuple[int, ...]) -> None:
    assert_served("opacus", layer.double(), reals(*shape))


@pytest.mark.parametrize(
    ("layer", "shape", "match"),
    [
        (nn.LayerNorm(4, bias=False), (3, 4), "bias=False"),
        (nn.InstanceNorm1d(4, affine=True, track_running_stats=True).eval(), (3, 4, 5), "track_running_stats=True"),
        (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (3, 4, 5, 5), "track_running_stats=True"),
        (nn.BatchNorm1d(4).eval(), (3, 4), "BatchNorm1d"),
        (nn.Bilinear(4, 4, 2), (3, 4), "Bilinear"),
    ],
)
def test_refuses_layers_that_opacus_gets_wrong(layer: nn.Module, shape: tuple[int, ...], match: str) -> None:
    inputs = (reals(*shape), reals(*shape)) if isinstance(layer, nn.Bilinear) else reals(*shape)
    assert_refused("opacus", layer.double(), inputs, match)


def test_embeddings() -> None:
    tokens = torch.tensor([[1, 2, 1], [5, 5, 5], [0, 1, 2]])
    assert_served("opacus", nn.Embedding(6, 4).double(), tokens)
    assert_served("opacus", nn.Embedding(6, 4, sparse=True).double(), tokens)
    assert_refused("opacus", nn.Embedding(6, 4, padding_idx=1).double(), tokens, "padding_idx=1")
    assert_refused("opacus", nn.EmbeddingBag(6, 4).double(), tokens, "repeated indices")


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_switch_for_cudnn_stays(deterministic: bool) -> None:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = deterministic
    try:
        assert_served("opacus", nn.Embedding(6, 4).double(), torch.tensor([[1, 2], [3, 1]]))
        assert torch.backends.cudnn.deterministic is deterministic
    finally:
        torch.backends.cudnn.deterministic = before


def test_layers_that_are_run_again_do_not_call_the_hooks_of_the_user() -> None:
    layer = nn.ConvTranspose1d(2, 2, 3).double()
    inputs = reals(3, 2, 4)
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    source = persample.make_source("opacus", layer, squared_error, check="never")
    source.per_sample(inputs, reals(3, 2, 6))
    assert [output.shape for output in seen] == [(3, 2, 6)]


class LastState(nn.Module):
    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.recurrent = recurrent

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.recurrent(x)[0][:, -1]
        return output


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bias": False}])
@pytest.mark.parametrize("kind", [DPLSTM, DPGRU, DPRNN])
def test_its_own_recurrent_layers_are_served_by_its_own_machinery(kind: Any, options: dict[str, Any]) -> None:
    model = LastState(kind(4, 3, batch_first=True, **options)).double()
    assert_served("opacus", model, reals(3, 5, 4))
    assert_served("opacus (module)", model.eval(), reals(3, 5, 4))
    assert_refused("opacus (rules)", model, reals(3, 5, 4), f"{kind.__name__} 'recurrent'")


def test_serves_a_class_that_the_user_has_registered() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x

    assert_refused("opacus (rules)", Scale().double(), reals(3, 4), "register_grad_sampler")
    assert_served("opacus", Scale().double(), reals(3, 4))  # torch.func runs it again for each sample

    def rule(layer: Scale, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
        return {layer.scale: activations[0] * backprops}

    register_grad_sampler(Scale)(rule)
    try:
        assert_served("opacus (rules)", Scale().double(), reals(3, 4))
        assert_served("opacus (module)", Scale().double(), reals(3, 4))
        assert_served("opacus", Scale().double().eval(), reals(3, 4))
    finally:
        del GradSampleModule.GRAD_SAMPLERS[Scale]


def test_importing_the_backend_leaves_logging_to_the_user() -> None:
    imports = "import logging, persample.sources.backends.external.opacus"
    code = f"{imports}; print(logging.root.handlers, logging.root.level)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "30"]
