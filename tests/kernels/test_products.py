"""The compiled products against the gradients of single samples in float64, on both sides of every switch."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from persample.kernels import compiled, products
from persample.kernels.convolution import (
    convolution_moments,
    convolution_moments_and_norms,
    convolution_per_sample,
    convolution_squared_norms,
)
from persample.kernels.images import checked
from persample.kernels.linear import linear_moments
from persample.kernels.outer import outer_moments
from persample.testing.devices import generator_of

FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d)

#: Around the widths of vectors and tiles: 4, 8, 16 lanes, 6, 12, 24 entries.
CHANNELS = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 25, 33])


@pytest.fixture(autouse=True)
def _only_where_there_are_kernels() -> None:
    reason = compiled.why_no_kernels()
    if reason:
        pytest.skip(reason)


def gradients(x: Tensor, delta: Tensor, kernel: list[int], *rest: Any) -> Tensor:
    stride, padding, dilation, groups, images = rest
    x, delta = x.double(), delta.double()
    weight = x.new_zeros(delta.shape[1], x.shape[1] // groups, *kernel, requires_grad=True)
    rows = []
    for start in range(0, len(x), images):
        own = slice(start, start + images)
        result = FUNCTIONS[len(kernel) - 1](x[own], weight, None, stride, padding, dilation, groups)
        rows.append(torch.autograd.grad(result, weight, delta[own])[0])
    return torch.stack(rows)


def laid(t: Tensor, how: str) -> Tensor:
    if how == "channels last" and t.dim() > 3:
        return t.to(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d)
    if how == "with gaps":
        return torch.stack([t, t], -1).flatten(-2)[..., ::2]
    return t


@st.composite
def convolutions(draw: Any) -> tuple[Any, ...]:
    dimensions = draw(st.integers(1, 3))

    def each(values: list[int]) -> list[int]:
        return [draw(st.sampled_from(values)) for _ in range(dimensions)]

    depthwise = draw(st.booleans())
    groups = draw(st.sampled_from([5, 16, 17, 40])) if depthwise else draw(st.integers(1, 3))
    inputs, outputs = (1, 1) if depthwise else (draw(CHANNELS), draw(CHANNELS))
    kernel, stride, padding, dilation = each([1, 2, 3, 5]), each([1, 1, 2]), each([0, 1, 2]), each([1, 1, 3])
    spans = [d * (k - 1) + 1 - 2 * p for k, p, d in zip(kernel, padding, dilation, strict=True)]
    size = [max(1, span) + extra for span, extra in zip(spans, each([0, 1, 4, 7]), strict=True)]
    batch, images = draw(st.sampled_from([1, 2, 5, 19])), draw(st.sampled_from([1, 1, 2]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    generator = generator_of(draw(st.integers(0, 2**31)))
    x = torch.randn(batch * images, inputs * groups, *size, dtype=dtype, generator=generator)
    weight = x.new_zeros(outputs * groups, inputs, *kernel)
    shape = FUNCTIONS[dimensions - 1](x, weight, None, stride, padding, dilation, groups).shape
    delta = torch.randn(shape, dtype=dtype, generator=generator)
    how = st.sampled_from(["as made", "channels last", "with gaps"])
    return laid(x, draw(how)), laid(delta, draw(how)), kernel, stride, padding, dilation, groups, images


def require_close(found: Tensor, expected: Tensor) -> None:
    assert (found.double() - expected).norm() <= (1e-5 if found.dtype == torch.float32 else 1e-12) * expected.norm()


@settings(max_examples=60)
@given(arguments=convolutions(), threads=st.integers(1, 3))
def test_convolutions(arguments: tuple[Any, ...], threads: int) -> None:
    g = gradients(*arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_threads", lambda c, batch: threads)
        total, squares, norms = convolution_moments_and_norms(*arguments)
        sums_alone, norms_alone = convolution_moments(*arguments), convolution_squared_norms(*arguments)
    for found, expected in ((total, g.sum(0)), (squares, g.square().sum(0)), (norms, g.flatten(1).square().sum(1))):
        require_close(found, expected)
    for found, alone in zip((total, squares, norms), (*sums_alone, norms_alone), strict=True):
        assert torch.equal(found, alone)


@settings(max_examples=60)
@given(arguments=convolutions(), rows=st.sampled_from([1, 4, 19]))
def test_gradients_by_samples_as_groups(arguments: tuple[Any, ...], rows: int) -> None:
    g, c = gradients(*arguments), checked(*arguments)
    by_kernel = [form for name, form in products.gradient_forms(c).items() if name.startswith("kernel")]
    assert bool(by_kernel) == (c.geometry.groups == c.images == 1)
    if by_kernel:
        by_kernel.append(partial(products._samples_as_groups, rows=rows))
    for form in by_kernel:
        (found,) = form(c)
        assert found.dtype == c.x.dtype
        require_close(found, g)
    require_close(convolution_per_sample(*arguments), g)


def test_gradients_where_the_kernel_does_not_serve() -> None:
    x, delta = torch.randn(3, 2, 4, dtype=torch.float16), torch.randn(3, 5, 4, dtype=torch.float16)
    arguments = (x, delta, [1], [1], [0], [1], 1, 1)
    assert convolution_per_sample(*arguments).shape == (3, 5, 2, 1)
    arguments = (x.double(), delta.double(), *arguments[2:])
    g = gradients(*arguments)
    for _ in range(2):
        require_close(convolution_per_sample(*arguments), g)
        with compiled.without_kernels():
            require_close(convolution_per_sample(*arguments), g)


@settings(max_examples=30)
@given(outputs=CHANNELS, inputs=CHANNELS, batch=st.integers(1, 9), positions=st.integers(2, 9), seed=st.integers(0, 99))
def test_linear_layers_on_positions(outputs: int, inputs: int, batch: int, positions: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, delta = torch.randn(batch, positions, inputs), torch.randn(batch, positions, outputs)
    g = torch.einsum("blo,bli->boi", delta.double(), x.double())
    for found, expected in zip(linear_moments(x, delta), (g.sum(0), g.square().sum(0)), strict=True):
        require_close(found, expected)


@settings(max_examples=60)
@given(
    sizes=st.tuples(st.sampled_from([1, 2, 40, 256, 257, 600]), st.integers(1, 3), CHANNELS | st.just(97), CHANNELS),
    layouts=st.tuples(*[st.sampled_from(["as made", "with gaps", "transposed"])] * 2),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_one_position(sizes: tuple[int, ...], layouts: tuple[str, str], dtype: torch.dtype, seed: int) -> None:
    batch, groups, outputs, inputs = sizes
    torch.manual_seed(seed)
    delta, a = torch.randn(batch, groups, outputs, dtype=dtype), torch.randn(batch, groups, inputs, dtype=dtype)
    delta, a = (
        t.mT.contiguous().mT if how == "transposed" else laid(t, how)
        for t, how in zip((delta, a), layouts, strict=True)
    )
    g = torch.einsum("bgo,bgi->bgoi", delta.double(), a.double())
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_WORTH_A_THREAD", 1)
        for threads in (1, 3):
            patch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            found.append(outer_moments(delta.unsqueeze(3), a.unsqueeze(3)))
    for sums, expected in zip(found[0], (g.sum(0), g.square().sum(0)), strict=True):
        require_close(sums, expected)
    assert all(map(torch.equal, *found)), "results depend on the number of threads"
    if groups == 1:
        assert all(map(torch.equal, linear_moments(a, delta), [sums[0] for sums in found[0]]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row_and_column(bad: float) -> None:
    x, delta = torch.ones(3, 1, 37), torch.ones(3, 1, 13)
    x[1, 0, 2], delta[1, 0, 3] = bad, bad
    met = torch.zeros(13, 37, dtype=torch.bool)
    met[:, 2], met[3] = True, True
    for found in linear_moments(x, delta):
        assert torch.equal(~found.isfinite(), met)


@pytest.mark.parametrize("channels", [(64, 64, 12), (3, 64, 32), (160, 130, 5)], ids=str)
def test_more_samples_than_are_taken_at_a_time(channels: tuple[int, int, int]) -> None:
    inputs, outputs, size = channels
    torch.manual_seed(0)
    x, delta = torch.randn(9, inputs, size, size), torch.randn(9, outputs, size, size)
    arguments = (x, delta, [3, 3], [1, 1], [1, 1], [1, 1], 1, 1)
    g = gradients(*arguments)
    first = convolution_moments(*arguments)
    for found, expected in zip(first, (g.sum(0), g.square().sum(0)), strict=True):
        require_close(found, expected)
    assert all(map(torch.equal, first, convolution_moments(*arguments)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_where_it_belongs(bad: float) -> None:
    x, delta = torch.ones(3, 5, 4, 4), torch.ones(3, 6, 4, 4)
    x[1, 2, 0, 0], delta[1, 3, 2, 2] = bad, bad
    total, squares = convolution_moments(x, delta, [1, 1], [1, 1], [0, 0], [1, 1], 1, 1)
    met = torch.zeros(6, 5, dtype=torch.bool)
    met[:, 2], met[3] = True, True
    for found in (total, squares):
        assert torch.equal(~found.squeeze().isfinite(), met)


@pytest.mark.parametrize("empty", ["samples", "channels", "outputs", "pixels"])
def test_sizes_of_zero(empty: str) -> None:
    pixels = 0 if empty == "pixels" else 4
    x = torch.randn(0 if empty == "samples" else 2, 0 if empty == "channels" else 3, pixels)
    delta = torch.randn(len(x), 0 if empty == "outputs" else 5, pixels)
    total, squares = convolution_moments(x, delta, [1], [1], [0], [1], 1, 1)
    assert total.shape == squares.shape == (delta.shape[1], x.shape[1], 1)
    expected = torch.einsum("bol,bcl->boc", delta, x)
    torch.testing.assert_close(total.squeeze(2), expected.sum(0))
    torch.testing.assert_close(squares.squeeze(2), expected.square().sum(0))


@pytest.mark.parametrize("sizes", [(0, 3, 5), (2, 0, 5), (2, 3, 0)], ids=str)
def test_one_position_of_sizes_of_zero(sizes: tuple[int, int, int]) -> None:
    batch, outputs, inputs = sizes
    for found in linear_moments(torch.randn(batch, 1, inputs), torch.randn(batch, 1, outputs)):
        assert found.shape == (outputs, inputs)
        assert torch.equal(found, torch.zeros(outputs, inputs))


def test_windows_outside_of_the_input_are_refused() -> None:
    with pytest.raises(RuntimeError):
        convolution_moments(torch.zeros(2, 3, 4), torch.zeros(2, 3, 9), [3], [1], [0], [1], 1, 1)


def test_dtypes_without_a_kernel_are_computed_otherwise() -> None:
    x, delta = torch.randn(3, 2, 4, dtype=torch.float16), torch.randn(3, 5, 4, dtype=torch.float16)
    total, _ = convolution_moments(x, delta, [1], [1], [0], [1], 1, 1)
    assert total.dtype == torch.float16


def test_the_kernel_can_be_switched_off() -> None:
    arguments = (torch.randn(3, 2, 6), torch.randn(3, 5, 4), [3], [1], [0], [1], 1, 1)
    with compiled.without_kernels():
        others = convolution_moments(*arguments)
    for found, expected in zip(convolution_moments(*arguments), others, strict=True):
        torch.testing.assert_close(found, expected)
