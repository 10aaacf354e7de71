"""Each form of a convolution's sums against one backward pass per sample in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from persample.kernels.convolution_forms import forms
from persample.kernels.images import Geometry, Images

FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

# (C, O, kernel, stride, padding, dilation, groups, input size), batch size, images of a sample
CASES = {
    "one dimension": ((3, 4, (5,), (1,), (2,), (1,), 1, (20,)), 7, 1),
    "one dimension, jumping and dilated": ((2, 4, (3,), (2,), (1,), (3,), 1, (23,)), 6, 1),
    "few channels": ((1, 10, (5, 5), (1, 1), (0, 0), (1, 1), 1, (28, 28)), 130, 1),
    "few channels in pieces that do not divide the batch": ((3, 6, (5, 5), (1, 1), (2, 2), (1, 1), 1, (32, 32)), 37, 1),
    "one sample": ((3, 6, (3, 3), (1, 1), (1, 1), (1, 1), 1, (9, 9)), 1, 1),
    "oblong, dilated along both": ((4, 6, (3, 2), (1, 1), (2, 1), (2, 3), 1, (11, 13)), 9, 1),
    "jumping along the second": ((4, 6, (3, 3), (1, 2), (1, 1), (1, 1), 1, (10, 11)), 9, 1),
    "jumping along the first": ((4, 6, (3, 3), (2, 1), (1, 1), (1, 1), 1, (10, 11)), 9, 1),
    "groups": ((4, 6, (3, 3), (1, 1), (1, 1), (1, 1), 2, (8, 8)), 9, 1),
    "each channel by itself": ((5, 5, (3, 3), (1, 1), (1, 1), (1, 1), 5, (8, 8)), 9, 1),
    "pointwise": ((8, 16, (1, 1), (1, 1), (0, 0), (1, 1), 1, (6, 6)), 20, 1),
    "frames of a sample": ((3, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1, (8, 8)), 5, 3),
    "many channels": ((64, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1, (6, 6)), 9, 1),
    "a large weight": ((128, 130, (3, 3), (1, 1), (1, 1), (1, 1), 1, (4, 4)), 3, 1),
    "three dimensions": ((2, 3, (3, 2, 2), (1, 1, 1), (1, 0, 1), (1, 1, 1), 1, (6, 7, 5)), 5, 1),
    "three dimensions, jumping": ((2, 3, (2, 2, 2), (1, 2, 2), (0, 1, 0), (2, 1, 1), 1, (6, 7, 5)), 5, 1),
}


def problem(name: str, dtype: torch.dtype) -> tuple[Images, Tensor, Tensor]:
    """Return a convolution, and Σ_i g_i and Σ_i g_i² by a loop over the samples."""
    (channels, outputs, kernel, stride, padding, dilation, groups, size), batch, images = CASES[name]
    torch.manual_seed(0)
    x = torch.randn(batch * images, channels, *size, dtype=torch.float64)
    weight = torch.randn(outputs, channels // groups, *kernel, dtype=torch.float64, requires_grad=True)
    function = FUNCTIONS[len(size)]
    delta = torch.randn_like(function(x, weight, None, stride, padding, dilation, groups))
    rows = []
    for i in range(batch):
        own = slice(i * images, (i + 1) * images)
        outputs_i = function(x[own], weight, None, stride, padding, dilation, groups)
        rows.append(torch.autograd.grad(outputs_i, weight, delta[own])[0])
    g = torch.stack(rows)
    geometry = Geometry(tuple(weight.shape), stride, padding, dilation, groups)
    convolution = Images(delta.to(dtype), x.to(dtype), geometry, images)
    torch.testing.assert_close(convolution.per_sample().double(), g, rtol=1e-3, atol=1e-3)
    return convolution, g.sum(0), g.square().sum(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_every_form_is_exact(name: str, dtype: torch.dtype) -> None:
    convolution, total, squares = problem(name, dtype)
    kinds = set()
    for title, form in forms(convolution).items():
        kinds.add(title.split()[0])
        for found, expected in zip(form.moments(convolution), (total, squares), strict=True):
            assert found.dtype == dtype
            error = (found.double() - expected).norm() / expected.norm()
            assert error < (1e-5 if dtype == torch.float32 else 1e-12), title
    assert "patches" in kinds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_every_form_gives_gradients_and_norms(name: str, dtype: torch.dtype) -> None:
    convolution, total, squares = problem(name, dtype)
    g, tolerance = convolution.per_sample(), 1e-4 if dtype == torch.float32 else 1e-12
    for form in forms(convolution).values():
        (rows,) = form.per_sample(convolution)
        assert float((rows - g).abs().max()) <= tolerance * float(g.abs().max())
        *sums, norms = form.moments_and_norms(convolution)
        for found, expected in zip((*sums, norms), (total, squares, g.flatten(1).square().sum(1)), strict=True):
            assert (found.double() - expected).norm() <= 10 * tolerance * expected.norm()


@pytest.mark.parametrize("kernel", [(2, 2), (3, 3)])
def test_images_of_one_pixel_in_strange_strides(kernel: tuple[int, int]) -> None:
    """Such an image is contiguous, and in channels last, too, which kernels of PyTorch stumble over."""
    x = torch.randn(5, 2, 1, 1, dtype=torch.float64).as_strided((5, 2, 1, 1), (2, 1, 2, 2))
    delta = F.conv2d(x, x.new_ones(16, 2, *kernel), padding=1)
    delta = delta.to(memory_format=torch.channels_last)
    convolution = Images(delta, x, Geometry((16, 2, *kernel), (1, 1), (1, 1), (1, 1), 1))
    expected = convolution.per_sample()
    for title, form in forms(convolution).items():
        total, squares = form.moments(convolution)
        torch.testing.assert_close(total, expected.sum(0), msg=lambda m, f=title: f"{f}: {m}")
        torch.testing.assert_close(squares, expected.square().sum(0))


def test_the_shapes_meet_every_form() -> None:
    kinds = {form.split()[0] for name in CASES for form in forms(problem(name, torch.float32)[0])}
    assert kinds >= {"patches", "rows", "aligned-patches", "aligned-rows", "grouped", "single"}


@pytest.mark.parametrize("name", CASES)
def test_memory_of_a_piece_is_bounded(name: str) -> None:
    """No form takes more samples at a time than its budget allows, or one."""
    convolution, *_ = problem(name, torch.float32)
    weight = convolution.geometry.weight
    gradient = torch.Size(weight).numel()
    for form in forms(convolution):
        rows = int(form.split()[-1]) if form[-1].isdigit() else 1
        assert rows == 1 or rows * gradient <= 2**19
