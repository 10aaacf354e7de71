from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persample.testing.devices import generator_of
from persample.vogn import core


def column(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(values, dtype=torch.float64)]


def test_the_precision_is_n_s_plus_lambda_and_the_scale_its_inverse_root() -> None:
    precision = core.posterior_precision([*column(0.0, 0.5), *column(2.0)], data_size=10, prior_precision=4.0)
    assert [p.tolist() for p in precision] == [[4.0, 9.0], [24.0]]
    scale = core.precision_to_scale(precision)
    assert [s.tolist() for s in scale] == [[0.5, pytest.approx(1 / 3)], [pytest.approx(1 / math.sqrt(24))]]


def test_the_tempered_precision_by_hand() -> None:
    """N (s + d) / τ + λ with λ for each weight."""
    (precision,) = core.posterior_precision(
        column(0.5, 2.0), data_size=10, prior_precision=column(3.0, 4.0), damping=0.1, temperature=0.25
    )
    assert precision.tolist() == pytest.approx([10 * 0.6 / 0.25 + 3, 10 * 2.1 / 0.25 + 4])


def test_line_6_by_hand() -> None:
    (s,) = core.update_curvature(column(1.0), column(3.0), decay=0.75)
    assert s.item() == 0.75 * 1 + 0.25 * 3


def test_line_7_by_hand() -> None:
    numerator = core.add_prior(column(0.5), column(2.0), data_size=10, prior_precision=5.0)
    divisor = core.divisor(column(1.5), data_size=10, prior_precision=5.0)
    (mean,) = core.update_mean(column(2.0), numerator, divisor, lr=0.1)
    assert mean.item() == pytest.approx(2 - 0.1 * (0.5 + 5 * 2 / 10) / (1.5 + 5 / 10), rel=1e-15)


@pytest.mark.parametrize("precision", [5.0, (5.0, 7.0)])
@pytest.mark.parametrize("mean", [0.0, -3.0, (-3.0, 4.0)])
def test_the_prior_by_hand(precision: float | tuple[float, float], mean: float | tuple[float, float]) -> None:
    """Numbers for all weights, and one for each weight."""
    arguments = {"data_size": 10, "temperature": 0.5}
    prior_precision = column(*precision) if isinstance(precision, tuple) else precision
    prior_mean = column(*mean) if isinstance(mean, tuple) else mean
    (numerator,) = core.add_prior(
        column(0.5, 0.6), column(2.0, 1.0), prior_precision=prior_precision, prior_mean=prior_mean, **arguments
    )
    weight = 0.5 * np.broadcast_to(precision, 2) / 10
    expected = np.array([0.5, 0.6]) + weight * (np.array([2.0, 1.0]) - mean)
    np.testing.assert_allclose(numerator.numpy(force=True), expected, rtol=1e-14)
    (divisor,) = core.divisor(column(1.5, 1.0), prior_precision=prior_precision, damping=0.2, **arguments)
    np.testing.assert_allclose(divisor.numpy(force=True), np.array([1.5, 1.0]) + 0.2 + weight, rtol=1e-14)


def test_updates_are_clipped_entry_by_entry() -> None:
    (mean,) = core.update_mean(column(0, 0, 0, 0), column(9, -9, 1, -1), column(2, 2, 2, 2), lr=1.0, max_update=3.0)
    assert mean.tolist() == [-3.0, 3.0, -0.5, 0.5]


def test_gradients_are_clipped_as_pytorch_does() -> None:
    generator = generator_of(0)
    gradients = [torch.randn(shape, generator=generator) for shape in ((3, 4), (5,), ())]
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for max_norm in (0.5, 100.0):
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.clone()
        torch.nn.utils.clip_grad_norm_(params, max_norm)
        for clipped, p in zip(core.clip_norm(gradients, max_norm), params, strict=True):
            torch.testing.assert_close(clipped, p.grad, rtol=1e-6, atol=0)


def test_nothing_that_is_passed_in_changes() -> None:
    a, b, c = column(2.0), column(1.0), column(0.5)
    core.posterior_precision(a, data_size=3, prior_precision=b, damping=0.1)
    core.precision_to_scale(a)
    core.update_curvature(a, b, decay=0.5)
    core.add_prior(a, b, data_size=3, prior_precision=c, prior_mean=c)
    core.divisor(a, data_size=3, prior_precision=b, damping=0.1)
    core.update_mean(a, b, c, lr=0.1, max_update=0.1)
    core.running_average(a, [0.5], b, decay=0.9)
    core.clip_norm(a, 0.1)
    assert [t[0].item() for t in (a, b, c)] == [2.0, 1.0, 0.5]


@given(beta=st.floats(0, 0.999), values=st.lists(st.floats(-10, 10), min_size=1, max_size=20))
def test_the_running_average_is_that_of_adam_when_beta_is_constant(beta: float, values: list[float]) -> None:
    average, mass, m = column(0.0), [0.0], 0.0
    for t, value in enumerate(values, start=1):
        average, mass, (corrected,) = core.running_average(average, mass, column(value), decay=beta)
        m = beta * m + (1 - beta) * value
        assert corrected.item() == pytest.approx(m / (1 - beta**t), rel=1e-9, abs=1e-12)
        assert average[0].item() == pytest.approx(m, rel=1e-9, abs=1e-12)


@given(betas=st.lists(st.floats(0, 0.999), min_size=1, max_size=20), value=st.floats(-10, 10))
def test_the_running_average_of_a_constant_is_the_constant_while_beta_changes(betas: list[float], value: float) -> None:
    average, mass = column(0.0), [0.0]
    for beta in betas:
        average, mass, (corrected,) = core.running_average(average, mass, column(value), decay=beta)
        assert corrected.item() == pytest.approx(value, rel=1e-9)


def test_each_parameter_has_a_bias_of_its_own() -> None:
    """One that was frozen for a while has averaged less."""
    _, mass, corrected = core.running_average([*column(0.0), *column(3.0)], [0.0, 0.6], [*column(1.0)] * 2, decay=0.5)
    assert mass == [0.5, 0.8]
    assert [c.item() for c in corrected] == [1.0, pytest.approx((1.5 + 0.5) / 0.8)]


def test_without_bias_correction_the_average_itself_is_used() -> None:
    average, _, used = core.running_average(column(0.0), [0.0], column(1.0), decay=0.9, bias_correction=False)
    assert used[0].item() == average[0].item() == pytest.approx(0.1)
