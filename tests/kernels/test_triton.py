"""Kernels in Triton, against loops in float64: on a GPU where there is one, else by Triton's interpreter."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are made, below
triton = pytest.importorskip("triton", reason="Triton is not installed, and there is none for this machine's wheels")
if DEVICE == "cpu":
    pytest.importorskip(
        "triton", minversion="3.7", reason="the interpreter of an older Triton does not run with NumPy 2.4"
    )

from persample.kernels.autotune import deterministic_choice  # noqa: E402
from persample.kernels.compiled import without_kernels  # noqa: E402
from persample.kernels.gpu import by_triton, kernels_for  # noqa: E402
from persample.kernels.triton import launch as kernels  # noqa: E402
from persample.kernels.triton import tuning  # noqa: E402
from persample.kernels.triton.tuning import Launch, Shape, launches, parts_of  # noqa: E402

Sums = tuple[Tensor, Tensor]
SMALLEST = Launch(16, 64, 16)
TILES = (*tuning.WIDE, *tuning.FEW_COLUMNS, *tuning.FEW_OUTPUTS)
EVERY_TILE = list({Launch(o, k, 32, warps, precision): None for o, k, warps, precision in TILES})
if DEVICE == "cpu":  # the interpreter multiplies in one way
    EVERY_TILE = list({replace(launch, precision="ieee", warps=4): None for launch in EVERY_TILE})
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def exactly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Neither TF32 nor what earlier runs found."""
    monkeypatch.setenv("PERSAMPLE_CACHE", str(tmp_path))
    torch.manual_seed(0)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    allow_tf32(convolutions=False, products=False)
    yield
    allow_tf32(*before)


def allow_tf32(convolutions: bool, products: bool) -> None:
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products


def numbers(*shape: int) -> Tensor:
    """Numbers with a mean, so that sums grow along the positions."""
    return torch.randn(*shape, device=DEVICE) + 0.5


def assert_close(found: Sums, g: Tensor) -> None:
    for each, truth in zip(found, (g.sum(0), g.square().sum(0)), strict=True):
        assert each.shape == truth.shape
        assert each.dtype == torch.float32
        assert (each - truth).abs().max() <= TOLERANCE * truth.abs().max()


def linear_gradients(x: Tensor, delta: Tensor) -> Tensor:
    return torch.stack([d.double().T @ a.double() for a, d in zip(x, delta, strict=True)])


@pytest.mark.parametrize("positions", [1, 2, 15, 16, 17, 32, 33, 70])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (3, 5), (16, 64), (17, 65), (15, 63), (64, 16), (66, 130)])
def test_linear(positions: int, outputs: int, inputs: int) -> None:
    x, delta = numbers(5, positions, inputs), numbers(5, positions, outputs)
    assert_close(kernels.linear_moments(x, delta, fixed=True), linear_gradients(x, delta))


@pytest.mark.parametrize("launch", EVERY_TILE, ids=str)
@pytest.mark.parametrize("positions", [1, 16, 45])
def test_linear_by_every_launch(launch: Launch, positions: int) -> None:
    x, delta = numbers(5, positions, 129), numbers(5, positions, 66)
    assert_close(kernels.linear_moments(x, delta, launch=launch), linear_gradients(x, delta))


@pytest.mark.parametrize("batch", [1, 2, 3, 16, 17, 100])
@pytest.mark.parametrize("positions", [1, 3])
def test_batches(batch: int, positions: int) -> None:
    x, delta = numbers(batch, positions, 9), numbers(batch, positions, 4)
    assert_close(kernels.linear_moments(x, delta, launch=SMALLEST), linear_gradients(x, delta))


STRIDED: dict[str, Callable[[int, int, int], Tensor]] = {
    "transposed": lambda b, n, k: numbers(b, k, n).mT,
    "positions first": lambda b, n, k: numbers(n, b, k).transpose(0, 1),
    "every other": lambda b, n, k: numbers(b, 2 * n, 2 * k)[:, ::2, ::2],
    "expanded along positions": lambda b, n, k: numbers(b, 1, k).expand(b, n, k),
    "expanded along samples": lambda b, n, k: numbers(1, n, k).expand(b, n, k),
    "expanded along columns": lambda b, n, k: numbers(b, n, 1).expand(b, n, k),
}


@pytest.mark.parametrize("positions", [1, 21])
@pytest.mark.parametrize("of_x", STRIDED)
@pytest.mark.parametrize("of_delta", STRIDED)
def test_strides(of_x: str, of_delta: str, positions: int) -> None:
    x, delta = STRIDED[of_x](4, positions, 18), STRIDED[of_delta](4, positions, 10)
    assert_close(kernels.linear_moments(x, delta, launch=SMALLEST), linear_gradients(x, delta))


# Convolutions as batch, channels, outputs, size, window, stride, padding, dilation, groups, images of a sample.
Sizes = tuple[
    int, int, int, tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], int, int
]
CONVOLUTIONS: dict[str, Sizes] = {
    "LeNet-5": (3, 3, 6, (12, 12), (5, 5), (1, 1), (0, 0), (1, 1), 1, 1),
    "3×3": (3, 16, 16, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1), 1, 1),
    "3×3, one block": (3, 17, 5, (4, 4), (3, 3), (1, 1), (1, 1), (1, 1), 1, 1),
    "strides": (2, 5, 4, (7, 10), (3, 2), (2, 3), (1, 0), (1, 1), 1, 1),
    "stride beyond the window": (2, 4, 4, (9, 9), (1, 1), (3, 2), (0, 0), (1, 1), 1, 1),
    "1×1": (3, 18, 7, (5, 6), (1, 1), (1, 1), (0, 0), (1, 1), 1, 1),
    "1×1 with padding": (3, 4, 7, (5, 6), (1, 1), (1, 1), (1, 2), (1, 1), 1, 1),
    "dilation": (2, 3, 4, (9, 8), (3, 3), (1, 2), (2, 1), (2, 3), 1, 1),
    "groups": (2, 6, 9, (6, 5), (3, 3), (1, 1), (1, 1), (1, 1), 3, 1),
    "depthwise": (2, 6, 6, (6, 5), (3, 3), (1, 1), (1, 1), (1, 1), 6, 1),
    "images": (2, 4, 5, (5, 5), (3, 3), (1, 1), (1, 1), (1, 1), 1, 3),
    "small images": (2, 4, 6, (2, 2), (3, 3), (1, 1), (1, 1), (1, 1), 2, 5),
    "one pixel": (5, 4, 5, (3, 3), (3, 3), (1, 1), (0, 0), (1, 1), 1, 1),
    "a column of pixels": (3, 4, 5, (6, 3), (1, 3), (1, 1), (0, 0), (1, 1), 1, 1),
    "a column from 1×1": (3, 4, 5, (6, 2), (1, 1), (1, 2), (0, 0), (1, 1), 1, 1),
    "one dimension": (3, 4, 6, (20,), (3,), (2,), (1,), (2,), 2, 2),
    "one dimension, 1": (3, 4, 6, (20,), (1,), (1,), (0,), (1,), 1, 1),
}


def convolution(sizes: Sizes) -> tuple[Tensor, Tensor, Tensor, tuple[object, ...]]:
    """Return x, δ, the gradients of the samples in float64, and the arguments after x and δ."""
    batch, channels, outputs, size, window, *settings, groups, images = sizes
    convolve = F.conv1d if len(size) == 1 else F.conv2d
    x = numbers(batch * images, channels, *size)
    weight = torch.randn(outputs, channels // groups, *window, dtype=torch.float64, device=DEVICE, requires_grad=True)
    options = (None, *settings, groups)
    delta = numbers(*convolve(x.double(), weight, *options).shape)
    gradients = [
        torch.autograd.grad(convolve(a.double(), weight, *options), weight, d.double())[0]
        for a, d in zip(x.split(images), delta.split(images), strict=True)
    ]
    return x, delta, torch.stack(gradients), (window, *settings, groups, images)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, channels_last: bool) -> None:
    x, delta, g, arguments = convolution(CONVOLUTIONS[name])
    launch = replace(SMALLEST, channels_last=channels_last)
    assert_close(kernels.convolution_moments(x, delta, *arguments, launch=launch), g)
    assert_close(kernels.convolution_moments(x, delta, *arguments, fixed=True), g)


@pytest.mark.parametrize("launch", EVERY_TILE, ids=str)
def test_convolutions_by_every_launch(launch: Launch) -> None:
    x, delta, g, arguments = convolution((3, 15, 66, (7, 7), (3, 3), (1, 1), (1, 1), (1, 1), 1, 1))
    assert_close(kernels.convolution_moments(x, delta, *arguments, launch=launch), g)


def test_convolutions_of_strided_tensors() -> None:
    x, delta, g, arguments = convolution((3, 4, 6, (8, 7), (3, 3), (2, 1), (1, 1), (1, 1), 2, 1))
    for channels_last in (True, False):
        launch = replace(SMALLEST, channels_last=channels_last)
        strided = x.contiguous(memory_format=torch.channels_last), delta.permute(2, 3, 1, 0).clone().permute(3, 2, 0, 1)
        assert_close(kernels.convolution_moments(*strided, *arguments, launch=launch), g)


def test_results_repeat() -> None:
    x, delta = numbers(50, 40, 30), numbers(50, 40, 20)
    first, second = (kernels.linear_moments(x, delta, fixed=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter multiplies as the processor does")
@pytest.mark.parametrize("precision", ["tf32x3", "ieee"])
def test_long_sums_are_as_exact_as_float32(precision: str) -> None:
    x, delta = numbers(4, 4096, 64).abs(), numbers(4, 4096, 64).abs()
    assert_close(kernels.linear_moments(x, delta, launch=Launch(64, 64, 32, 4, precision)), linear_gradients(x, delta))


@pytest.mark.skipif(DEVICE == "cpu", reason="trials take a GPU")
def test_trials_are_remembered(tmp_path: Path) -> None:
    x, delta, g, arguments = convolution(CONVOLUTIONS["3×3"])
    assert_close(kernels.convolution_moments(x, delta, *arguments), g)
    assert len(list(tmp_path.iterdir())) == 1


# How a kernel is launched.


@pytest.mark.parametrize("samples", [1, 2, 7, 16, 100, 513])
@pytest.mark.parametrize(("outputs", "columns"), [(1, 1), (64, 576), (512, 4608), (50_000, 768)])
def test_every_part_has_samples(samples: int, outputs: int, columns: int) -> None:
    for processors in (1, 2, 132):
        shape = Shape((), samples, outputs, columns, 64)
        for launch in launches(shape):
            parts = parts_of(shape, launch, processors)
            each = -(-samples // parts)
            assert 1 <= parts <= samples
            assert (parts - 1) * each < samples <= parts * each


def test_what_was_found_is_remembered(tmp_path: Path) -> None:
    shape, launch = Shape(("linear", ("ieee",), True), 8, 64, 64, 16), EVERY_TILE[-1]
    tuning.remember("a GPU, Triton 3", shape, launch)
    tuning.remember("a GPU, Triton 3", replace(shape, groups=2), EVERY_TILE[0])
    (file,) = tmp_path.iterdir()
    assert len(json.loads(file.read_text())) == 2
    assert tuning.remembered("a GPU, Triton 3", shape, EVERY_TILE) == launch
    assert tuning.remembered("a GPU, Triton 3", replace(shape, groups=2), EVERY_TILE) == EVERY_TILE[0]
    assert tuning.remembered("a GPU, Triton 3", shape, EVERY_TILE[:1]) is None  # no longer a candidate
    assert tuning.remembered("another GPU", shape, EVERY_TILE) is None


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '{"a": 1}', "\udcff"])
def test_a_damaged_file_is_none(content: str, caplog: pytest.LogCaptureFixture) -> None:
    file = tuning.file_of("a GPU")
    file.write_text(content, errors="surrogateescape")
    shape = Shape((), 1, 1, 1, 1)
    assert tuning.remembered("a GPU", shape, EVERY_TILE) is None
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (content != '{"a": 1}')
    assert all(str(file) in text for text in said)
    tuning.remember("a GPU", shape, EVERY_TILE[0])
    assert tuning.remembered("a GPU", shape, EVERY_TILE) == EVERY_TILE[0]
    assert list(json.loads(file.read_text()).values())[-1] == asdict(EVERY_TILE[0])


def test_without_a_folder_nothing_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PERSAMPLE_CACHE", str(tmp_path / "file"))
    tuning.remember("a GPU", Shape((), 1, 1, 1, 1), EVERY_TILE[0])
    assert tuning.remembered("a GPU", Shape((), 1, 1, 1, 1), EVERY_TILE) is None


def test_tf32_only_where_the_user_allows_it() -> None:
    assert not kernels.allows_tf32()
    allow_tf32(convolutions=True, products=False)  # PyTorch's default, nobody's wish
    assert not kernels.allows_tf32()
    allow_tf32(convolutions=False, products=True)
    assert kernels.allows_tf32()
    torch.set_float32_matmul_precision("highest")
    assert not kernels.allows_tf32()
    torch.set_float32_matmul_precision("high")
    assert kernels.allows_tf32()
    assert {launch.precision for launch in launches(Shape((), 9, 70, 70, 9), tf32=True)} == {"tf32"}


def test_what_does_not_run_is_a_runtime_error() -> None:
    x = numbers(2, 3, 4)
    assert_close(by_triton(kernels.linear_moments, x, x), linear_gradients(x, x))

    def fails(*_: object, **__: object) -> Sums:
        raise triton.OutOfResources(2**20, 2**17, "shared memory")

    with pytest.raises(RuntimeError, match="Triton: out of resource"):
        by_triton(fails, x, x)


def test_only_float32_on_a_gpu_is_served() -> None:
    x = numbers(2, 3, 4)
    assert (kernels_for(x) is not None) == (DEVICE == "cuda")
    assert kernels_for(x.double()) is None
    assert kernels_for(x.half()) is None
    assert kernels_for(x[:0]) is None
    assert kernels_for(x.cpu()) is None
    with without_kernels():
        assert kernels_for(x) is None


@pytest.mark.skipif(DEVICE == "cpu", reason="only a GPU's tensors are given to Triton")
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_operators_on_a_gpu(deterministic: bool) -> None:
    with deterministic_choice(deterministic):
        for positions in (1, 9):
            x, delta = numbers(6, positions, 30), numbers(6, positions, 20)
            assert_close(torch.ops.persample.linear_moments(x, delta), linear_gradients(x, delta))
        for sizes in CONVOLUTIONS.values():
            x, delta, g, arguments = convolution(sizes)
            assert_close(torch.ops.persample.convolution_moments(x, delta, *arguments), g)
