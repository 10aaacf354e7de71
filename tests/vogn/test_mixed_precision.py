"""Autocast and gradient scalers, in all three ways to observe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from persample.errors import UsageError
from persample.vogn import SkippedStepWarning

from .ways import RECORDING, RULES_AND_BACKENDS, Batch, Observe, by_closure, by_context, by_observing, make, network


class TestMixedPrecision:
    @pytest.mark.parametrize("backend", RECORDING)
    @pytest.mark.parametrize("observe", [by_observing, by_context, by_closure])
    def test_bfloat16_autocast(self, backend: str, observe: Observe, batch: Batch) -> None:
        """Close to float32, with parameters, moments and curvature in float32."""
        x, y = batch[0].float(), batch[1]
        plain, mixed = (make(backend=backend, model=network(torch.float32)) for _ in range(2))
        by_observing(plain, x, y)
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            observe(mixed, x, y)
        for p, q in zip(mixed.model.parameters(), plain.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=2e-3)
            assert mixed.state[p]["curvature"].dtype == torch.float32
        for actual, due in zip(mixed._precision(), plain._precision(), strict=True):
            torch.testing.assert_close(actual, due, rtol=2e-2, atol=0)

    @pytest.mark.parametrize(("rule", "backend"), RULES_AND_BACKENDS)
    @pytest.mark.parametrize("unscale", [False, True])
    def test_the_scale_of_a_gradient_scaler_is_taken_out(
        self, rule: Any, backend: str, unscale: bool, batch: Batch
    ) -> None:
        x, y = batch[0].float(), batch[1]
        plain, scaled = (make(rule, backend, model=network(torch.float32)) for _ in range(2))
        by_context(plain, x, y)
        scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=1024.0)
        with scaled.sampled_params(train=True, grad_scaler=scaler):
            scaler.scale(F.cross_entropy(scaled.model(x), y)).backward()
        if unscale:
            scaler.unscale_(scaled)
            torch.nn.utils.clip_grad_norm_(scaled.model.parameters(), 1.0)
        scaler.step(scaled)
        scaler.update()
        assert scaled.steps == 1
        for p, q in zip(scaled.model.parameters(), plain.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
        for actual, due in zip(scaled._precision(), plain._precision(), strict=True):
            torch.testing.assert_close(actual, due, rtol=1e-5, atol=0)

    @pytest.mark.parametrize(("rule", "backend"), RULES_AND_BACKENDS)
    def test_float16_autocast_with_a_gradient_scaler(self, rule: Any, backend: str, batch: Batch) -> None:
        """Close to float32: whatever is scaled in float16 is unscaled and squared in float32."""
        x, y = batch[0].float(), batch[1]
        plain, mixed = (make(rule, backend, model=network(torch.float32)) for _ in range(2))
        device = torch.get_default_device().type
        scaler = torch.amp.GradScaler(device, init_scale=256.0)
        by_context(plain, x, y)
        with mixed.sampled_params(train=True, grad_scaler=scaler):
            with torch.autocast(device, torch.float16):
                loss = F.cross_entropy(mixed.model(x), y)
            scaler.scale(loss).backward()
        scaler.step(mixed)
        scaler.update()
        assert (mixed.steps, mixed.skipped_steps) == (1, 0)
        for p, q in zip(mixed.model.parameters(), plain.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=2e-3)
        for actual, due in zip(mixed._precision(), plain._precision(), strict=True):
            assert actual.dtype == torch.float32
            torch.testing.assert_close(actual, due, rtol=2e-2, atol=0)

    @pytest.mark.parametrize("unscale", [False, True])
    def test_an_overflow_skips_the_step_without_counting(self, unscale: bool, batch: Batch) -> None:
        x, y = batch[0].float(), batch[1]
        optimizer = make(model=network(torch.float32))
        scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=1e38)
        before = optimizer.model[0].weight.detach().clone()
        for _ in range(6):  # more than would be an error otherwise
            with optimizer.sampled_params(train=True, grad_scaler=scaler):
                scaler.scale(100 * F.cross_entropy(optimizer.model(1e3 * x), y)).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert torch.equal(optimizer.model[0].weight, before)
        assert (optimizer.steps, optimizer.skipped_steps, optimizer.skipped_in_a_row) == (0, 6, 0)
        assert scaler.get_scale() < 1e38
        assert not optimizer._pending.observations.parts

    def test_a_scaler_that_was_not_told_of_is_noticed(self, batch: Batch) -> None:
        x, y = batch[0].float(), batch[1]
        optimizer = make(model=network(torch.float32))
        scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=2.0)
        with optimizer.sampled_params(train=True):
            scaler.scale(F.cross_entropy(optimizer.model(x), y)).backward()
        with pytest.raises(UsageError, match="grad_scaler=scaler"):
            scaler.step(optimizer)

    def test_a_disabled_scaler_does_nothing(self, batch: Batch) -> None:
        x, y = batch[0].float(), batch[1]
        optimizer, plain = (make(model=network(torch.float32)) for _ in range(2))
        by_context(plain, x, y)
        scaler = torch.amp.GradScaler(torch.get_default_device().type, enabled=False)
        with optimizer.sampled_params(train=True, grad_scaler=scaler):
            scaler.scale(F.cross_entropy(optimizer.model(x), y)).backward()
        scaler.step(optimizer)
        assert torch.equal(optimizer.model[0].weight, plain.model[0].weight)

    def test_without_a_scalers_step_an_overflow_is_a_skipped_step(self, batch: Batch) -> None:
        x, y = batch[0].float(), batch[1]
        optimizer = make(model=network(torch.float32))
        with optimizer.sampled_params(train=True):
            (1e38 * F.cross_entropy(optimizer.model(1e3 * x), y)).backward()
        with pytest.warns(SkippedStepWarning):
            optimizer.step()
        assert optimizer.skipped_steps == 1
