from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persample.vogn import core


def column(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(values, dtype=torch.float64)]


def test_the_precision_is_n_s_plus_lambda_and_the_scale_its_inverse_root() -> None:
    curvature = [*column(0.0, 0.5), *column(2.0)]
    precision = core.posterior_precision(curvature, data_size=10, prior_precision=4.0)
    scale = core.posterior_scale(curvature, data_size=10, prior_precision=4.0)
    assert [p.tolist() for p in precision] == [[4.0, 9.0], [24.0]]
    assert [s.tolist() for s in scale] == [[0.5, pytest.approx(1 / 3)], [pytest.approx(1 / math.sqrt(24))]]


def test_line_6_by_hand() -> None:
    (s,) = core.update_curvature(column(1.0), column(3.0), decay=0.75)
    assert s.item() == 0.75 * 1 + 0.25 * 3


@pytest.mark.parametrize(("order", "divisor"), [("printed", 1.0), ("updated", 1.5)])
def test_line_7_by_hand(order: core.Order, divisor: float) -> None:
    (mean,), (s,) = core.vogn_update(
        column(2.0),
        column(1.0),
        column(0.5),
        column(3.0),
        lr=0.1,
        data_size=10,
        prior_precision=5.0,
        decay=0.75,
        order=order,
    )
    assert s.item() == 1.5
    assert mean.item() == pytest.approx(2 - 0.1 * (0.5 + 5 * 2 / 10) / (divisor + 5 / 10), rel=1e-15)


def test_nothing_that_is_passed_in_changes() -> None:
    tensors = [column(2.0), column(1.0), column(0.5), column(3.0)]
    core.vogn_update(*tensors, lr=0.1, data_size=10, prior_precision=5.0, decay=0.75, order="printed")
    core.average_gradient(tensors[0], [0.5], tensors[1], momentum=0.9)
    assert [t[0].item() for t in tensors] == [2.0, 1.0, 0.5, 3.0]


@given(beta=st.floats(0, 0.999), gradients=st.lists(st.floats(-10, 10), min_size=1, max_size=20))
def test_the_running_mean_is_that_of_adam_when_momentum_is_constant(beta: float, gradients: list[float]) -> None:
    buffer, mass, m = column(0.0), [0.0], 0.0
    for t, g in enumerate(gradients, start=1):
        buffer, mass, (corrected,) = core.average_gradient(buffer, mass, column(g), momentum=beta)
        m = beta * m + (1 - beta) * g
        assert corrected.item() == pytest.approx(m / (1 - beta**t), rel=1e-9, abs=1e-12)


@given(
    betas=st.lists(st.floats(0, 0.999), min_size=1, max_size=20),
    gradient=st.floats(-10, 10),
)
def test_the_running_mean_of_a_constant_is_the_constant_while_momentum_changes(
    betas: list[float], gradient: float
) -> None:
    buffer, mass = column(0.0), [0.0]
    for beta in betas:
        buffer, mass, (corrected,) = core.average_gradient(buffer, mass, column(gradient), momentum=beta)
        assert corrected.item() == pytest.approx(gradient, rel=1e-9)
