"""A batch in parts whose losses were divided, as trainers do: at one draw it gives what the whole batch would have."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persample.errors import OptionError, UsageError
from persample.vogn import IVON, OGN, VOGN, LossReductionWarning, MeanFieldVI, Vadam

from ..ways import RECORDING, Batch, by_context, make, network

RULES = [*((VOGN, backend) for backend in RECORDING), (OGN, "fused"), (IVON, ""), (Vadam, ""), (MeanFieldVI, "")]
UNEVEN = (slice(0, 1), slice(1, 4), slice(4, 6))
EVEN = (slice(0, 3), slice(3, 6))


def end(optimizer: Any) -> list[Tensor]:
    return [
        *(p.detach().clone() for p in optimizer.model.parameters()),
        *optimizer._precision(),
        optimizer.generator.get_state(),
    ]


def assert_same(one: Any, other: Any, **tolerances: float) -> None:
    for a, b in zip(end(one), end(other), strict=True):
        torch.testing.assert_close(a, b, **({"rtol": 1e-9, "atol": 1e-12} | tolerances))


def in_parts(optimizer: Any, batch: Batch, parts: tuple[slice, ...], **options: Any) -> None:
    for rows in parts:
        with optimizer.sampled_params(train=True, redraw=False, loss_scale=1 / len(parts), **options):
            loss = F.cross_entropy(optimizer.model(batch[0][rows]), batch[1][rows])
            (loss / len(parts)).backward()


@pytest.mark.parametrize(("rule", "backend"), RULES)
@pytest.mark.parametrize("parts", [EVEN, UNEVEN])
def test_parts_are_the_whole(rule: Any, backend: str, parts: tuple[slice, ...], batch: Batch) -> None:
    accumulated, whole = make(rule, backend), make(rule, backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            in_parts(accumulated, batch, parts)
            accumulated.step()
            accumulated.zero_grad()
            by_context(whole, *batch)
    assert_same(accumulated, whole)


def test_without_redraw_the_first_block_draws_anew_after_each_step(batch: Batch) -> None:
    optimizer, draws = make(), []
    for _ in range(2):
        for _ in range(2):
            with optimizer.sampled_params(train=True, redraw=False):
                draws.append(optimizer.model[0].weight.detach().clone())
                F.cross_entropy(optimizer.model(batch[0]), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])
    assert torch.equal(draws[2], draws[3])


def test_the_scale_is_taken_out_of_first_and_second_moment(batch: Batch) -> None:
    """Whichever way the loss was multiplied: as a number, as a function that is asked at the end, for a sum."""
    plain = make()
    by_context(plain, *batch)
    scales: list[Any] = [0.25, lambda: 0.25]
    for scale in scales:
        for reduction in ("mean", "sum"):
            scaled = make()
            with scaled.sampled_params(train=True, loss_scale=scale, loss_reduction=reduction):
                (0.25 * F.cross_entropy(scaled.model(batch[0]), batch[1], reduction=reduction)).backward()
            scaled.step()
            assert_same(scaled, plain)


@pytest.mark.parametrize("rule", [VOGN, IVON, Vadam])
@pytest.mark.parametrize("parts", [EVEN, UNEVEN])
def test_clipping_after_the_last_part(rule: Any, parts: tuple[slice, ...], batch: Batch) -> None:
    """p.grad has the mean of the parts' means; what clipping makes of that is the gradient of the step."""
    clipped, given = make(rule), make(rule)
    for one in (clipped, given):
        in_parts(one, batch, parts)
    norm = nn.utils.clip_grad_norm_(clipped.model.parameters(), 0.05)
    assert norm > 0.05
    due = {name: p.grad * (0.05 / (norm + 1e-6)) for name, p in given.model.named_parameters()}
    clipped.step()
    given._pending.observations.parts[0].moments.mean.update(due)
    given._pending.left = None
    for p in given.model.parameters():
        p.grad = None
    given.step()
    assert_same(clipped, given)


def test_clipping_what_is_short_enough_changes_nothing(batch: Batch) -> None:
    clipped, plain = make(), make()
    for one in (clipped, plain):
        in_parts(one, batch, UNEVEN)
    nn.utils.clip_grad_norm_(clipped.model.parameters(), 1e6)
    for one in (clipped, plain):
        one.step()
    assert_same(clipped, plain)


def test_clipping_on_top_of_something_else_is_refused(batch: Batch) -> None:
    optimizer = make()
    in_parts(optimizer, batch, EVEN[:1])
    optimizer._pending.forget()  # but its gradient is still there
    in_parts(optimizer, batch, EVEN)
    nn.utils.clip_grad_norm_(optimizer.model.parameters(), 0.01)
    with pytest.raises(UsageError, match="it was not empty before"):
        optimizer.step()


@pytest.mark.parametrize("parts", [EVEN, UNEVEN])
@pytest.mark.parametrize("clip", [False, True])
def test_with_a_gradient_scaler(parts: tuple[slice, ...], clip: bool, batch: Batch) -> None:
    batch = (batch[0].float(), batch[1])
    scaled, plain = make(model=network(torch.float32)), make(model=network(torch.float32))
    scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=1024.0)
    for rows in parts:
        with scaled.sampled_params(train=True, redraw=False, loss_scale=1 / len(parts), grad_scaler=scaler):
            loss = F.cross_entropy(scaled.model(batch[0][rows]), batch[1][rows])
            scaler.scale(loss / len(parts)).backward()
    in_parts(plain, batch, parts)
    if clip:
        scaler.unscale_(scaled)
        for one in (scaled, plain):
            nn.utils.clip_grad_norm_(one.model.parameters(), 0.05)
    scaler.step(scaled)
    plain.step()
    assert_same(scaled, plain, rtol=1e-5, atol=1e-7)


def test_where_the_scale_is_not_told_a_warning_says_how_to(batch: Batch) -> None:
    optimizer = make()
    optimizer.model[0].weight.grad = torch.zeros(4, 3, dtype=torch.float64)
    with (
        pytest.warns(LossReductionWarning, match=r"divided by 4.*persample\.integrations.*loss_scale=1 / 4"),
        optimizer.sampled_params(train=True),
    ):
        (F.cross_entropy(optimizer.model(batch[0]), batch[1]) / 4).backward()


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), "half", lambda: 0.0])
def test_a_scale_that_is_none_is_refused(scale: Any, batch: Batch) -> None:
    optimizer = make()
    with pytest.raises(OptionError, match="loss_scale"), optimizer.sampled_params(train=True, loss_scale=scale):
        F.cross_entropy(optimizer.model(batch[0]), batch[1]).backward()
    by_context(optimizer, *batch)
