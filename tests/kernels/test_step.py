"""The operators of the step: each form against NumPy in float64, and against each other."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from persample.kernels import compiled
from persample.kernels.step import all_finite, draw_
from persample.testing.devices import generator_of, on_cuda

FORMS = ["kernels", "PyTorch"]
SIZES = (0, 1, 3, 7, 8, 15, 16, 17, 33, 4095, 4096, 4097, 12289)  # around the widths of vectors and of pieces


def form(name: str) -> object:
    if name == "PyTorch":
        return compiled.without_kernels()
    reason = None if on_cuda() else compiled.why_no_kernels()  # without Triton, a GPU computes by PyTorch twice
    if reason:
        pytest.skip(reason)
    return nullcontext()


def drawn(mean: list[Tensor], precision: list[Tensor], noise: list[Tensor]) -> list[Tensor]:
    weights = [torch.full_like(m, 7.0) for m in mean]
    draw_(weights, mean, precision, noise)
    return weights


def of(tensor: Tensor) -> Any:
    return tensor.double().numpy(force=True)


def operands(sizes: list[int], dtype: torch.dtype, seed: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    generator = generator_of(seed)
    mean, noise = ([torch.randn(n, generator=generator, dtype=dtype) for n in sizes] for _ in range(2))
    return mean, [torch.rand(n, generator=generator, dtype=dtype) * 1e3 + 1e-2 for n in sizes], noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FORMS)
@given(sizes=st.lists(st.sampled_from(SIZES), min_size=0, max_size=4), seed=st.integers(0, 2**31))
def test_a_draw_is_mean_plus_noise_over_root_of_precision(
    name: str, dtype: torch.dtype, sizes: list[int], seed: int
) -> None:
    mean, precision, noise = operands(sizes, dtype, seed)
    with form(name):
        weights = drawn(mean, precision, noise)
    for w, m, p, e in zip(weights, mean, precision, noise, strict=True):
        expected = of(m) + of(e) / np.sqrt(of(p))
        np.testing.assert_allclose(w.cpu(), expected, rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("name", FORMS)
def test_a_draw_keeps_what_is_not_finite(name: str) -> None:
    mean = torch.tensor([1.0, 1.0, 1.0, 1.0, torch.nan, torch.inf])
    precision = torch.tensor([0.0, -1.0, torch.inf, torch.nan, 1.0, 1.0])
    with form(name):
        (weights,) = drawn([mean], [precision], [torch.ones(6)])
    np.testing.assert_array_equal(weights.cpu(), [np.inf, np.nan, 1.0, np.nan, np.nan, np.inf])


@pytest.mark.parametrize("name", FORMS)
def test_a_draw_does_not_depend_on_the_number_of_threads(name: str) -> None:
    of_model = operands(list(SIZES), torch.float32, seed=0)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with form(name):
                results.append(drawn(*of_model))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def strided(values: Tensor) -> Tensor:
    return torch.stack([values, values], dim=-1)[..., 0]


@pytest.mark.parametrize("which", range(4))
def test_a_draw_takes_tensors_with_gaps(which: int) -> None:
    """Only PyTorch's form does; the other must leave it to that one."""
    (mean,), (precision,), (noise,) = operands([12], torch.float32, seed=1)
    tensors = [torch.zeros(3, 4), *(t.view(3, 4) for t in (mean, precision, noise))]
    tensors[which] = strided(tensors[which])
    draw_(*([t] for t in tensors))
    torch.testing.assert_close(tensors[0].flatten(), mean + noise / precision.sqrt())


def test_a_draw_of_half_precision_takes_a_precision_in_float32() -> None:
    weights, mean = torch.zeros(5, dtype=torch.bfloat16), torch.ones(5, dtype=torch.bfloat16)
    draw_([weights], [mean], [torch.full((5,), 4.0)], [torch.ones(5)])
    assert weights.tolist() == [1.5] * 5


@pytest.mark.parametrize("name", FORMS)
def test_other_shapes_are_refused(name: str) -> None:
    with form(name):
        with pytest.raises(ValueError, match=r"shapes of noise are \[\(3,\)\], those wanted \[\(4,\)\]"):
            draw_([torch.ones(4)], [torch.ones(4)], [torch.ones(4)], [torch.ones(3)])
        with pytest.raises(ValueError, match="shapes of mean"):
            draw_([torch.ones(4)], [], [torch.ones(4)], [torch.ones(4)])


@pytest.mark.parametrize("name", FORMS)
def test_the_operator_is_registered_as_pytorch_wants_it(name: str) -> None:
    with form(name):
        mean, precision, noise = operands([5, 20], torch.float32, seed=2)
        torch.library.opcheck(draw_, ([torch.zeros(5), torch.zeros(20)], mean, precision, noise))


@pytest.mark.skipif(on_cuda(), reason="a GPU looks at a norm")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_entry_that_is_not_finite_is_seen_wherever_it_is(bad: float, dtype: torch.dtype) -> None:
    with form("kernels"):
        for size in SIZES:
            tensors = [torch.full((5,), torch.finfo(dtype).max, dtype=dtype), torch.zeros(size, dtype=dtype)]
            assert all_finite(tensors) is True
            for place in {0, size // 2, size - 1} if size else ():
                spoilt = tensors[1].clone()
                spoilt[place] = bad
                assert all_finite([tensors[0], spoilt]) is False


def test_without_kernels_nobody_looks() -> None:
    with form("PyTorch"):
        assert all_finite([torch.ones(3)]) is None
    assert all_finite([torch.ones(3, dtype=torch.float16)]) is None
