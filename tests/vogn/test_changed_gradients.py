"""What users do to `p.grad` between backward and step: it is the gradient of the step, or the user is told why not.

The truth is the rule, written down here, or a pass whose gradient was that from the beginning.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persample.errors import UsageError
from persample.testing.devices import generator_of
from persample.vogn import IVON, OGN, VOGN, MeanFieldVI, UnusedGradientWarning, Vadam

from .ways import RULES_AND_BACKENDS, Batch, by_context, make, network

Change = Callable[[nn.Module], Any]


def clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e-2)


def clip_data(model: nn.Module) -> None:  # as in old code; not seen by version counters
    for p in model.parameters():
        p.grad.data.clamp_(-1e-2, 1e-2)


def mask(model: Any) -> None:
    model[0].weight.grad[:, 0] = 0


def replace(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = 0.5 * p.grad


def add_noise(model: nn.Module) -> None:
    generator = generator_of(7)
    for p in model.parameters():
        p.grad += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def penalise(model: nn.Module) -> None:
    (0.1 * torch.stack([p.abs().sum() for p in model.parameters()]).sum()).backward()


CHANGES = [clip, clip_data, mask, replace, add_noise, penalise]
RULES = [*RULES_AND_BACKENDS, (OGN, "fused")]


def loss_of(optimizer: Any, batch: Batch, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(optimizer.model(batch[0]), batch[1], reduction=reduction)


def end(optimizer: Any) -> list[Tensor]:
    return [*(p.detach().clone() for p in optimizer.model.parameters()), *optimizer._precision()]


def assert_same(one: Any, other: Any) -> None:
    for a, b in zip(end(one), end(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def given(rule: Any, backend: str, batch: Batch, change: Change, **settings: Any) -> Any:
    """The optimizer after a step whose recorded gradient is what `change` makes of that of the pass."""
    optimizer = make(rule, backend, **settings)
    with optimizer.sampled_params(train=True):
        loss_of(optimizer, batch).backward()
    (part,) = optimizer._pending.observations.parts
    stand_in = network()  # at the mean, as after the block
    for (name, p), q in zip(stand_in.named_parameters(), optimizer.model.parameters(), strict=True):
        assert torch.equal(p, q)
        p.grad = part.moments.mean[name].clone()
    change(stand_in)
    part.moments.mean.update({name: p.grad for name, p in stand_in.named_parameters()})
    optimizer._pending.left = None
    for p in optimizer.model.parameters():
        p.grad = None
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(("rule", "backend"), RULES)
@pytest.mark.parametrize("change", CHANGES)
class TestOneBlock:
    def test_after_it(self, rule: Any, backend: str, change: Change, batch: Batch) -> None:
        optimizer = make(rule, backend)
        with optimizer.sampled_params(train=True):
            loss_of(optimizer, batch).backward()
        change(optimizer.model)
        optimizer.step()
        assert_same(optimizer, given(rule, backend, batch, change))

    def test_in_it(self, rule: Any, backend: str, change: Change, batch: Batch) -> None:
        if change is penalise:
            pytest.skip("a penalty in the block is refused")
        optimizer = make(rule, backend)
        with optimizer.sampled_params(train=True):
            loss_of(optimizer, batch).backward()
            change(optimizer.model)
        optimizer.step()
        assert_same(optimizer, given(rule, backend, batch, change))


@pytest.mark.parametrize("change", [clip, mask])
def test_the_update_is_the_rule_with_that_gradient(change: Change, batch: Batch) -> None:
    """μ − α (G + λ μ / N) / (s + λ / N), while s gets the mean squares of the samples' gradients as they were."""
    for backend in ("fused", "loop"):
        optimizer, plain = (make(VOGN, backend, prior_precision=3.0, decay=0.9) for _ in range(2))
        before = [p.detach().clone() for p in optimizer.model.parameters()]
        with optimizer.sampled_params(train=True):
            loss_of(optimizer, batch).backward()
        change(optimizer.model)
        gradients = [p.grad.clone() for p in optimizer.model.parameters()]
        optimizer.step()
        by_context(plain, *batch)
        for p, q, mean, g in zip(
            optimizer.model.parameters(), plain.model.parameters(), before, gradients, strict=True
        ):
            due = mean - 0.01 * (g + 3.0 * mean / 100) / (0.5 + 3.0 / 100)
            torch.testing.assert_close(p.detach(), due, rtol=1e-9, atol=1e-12)
            assert torch.equal(optimizer.state[p]["curvature"], plain.state[q]["curvature"])


def test_clipping_by_hand_is_clipping_by_the_setting(batch: Batch) -> None:
    by_hand, by_setting = make(), make(max_grad_norm=0.05)
    with by_hand.sampled_params(train=True):
        loss_of(by_hand, batch).backward()
    nn.utils.clip_grad_norm_(by_hand.model.parameters(), 0.05)
    by_hand.step()
    by_context(by_setting, *batch)
    assert_same(by_hand, by_setting)


@pytest.mark.parametrize(
    ("rule", "backend"), [(VOGN, "fused"), (VOGN, "loop"), (OGN, "fused"), (Vadam, ""), (MeanFieldVI, "")]
)
def test_in_a_closure_each_draw_has_its_own(rule: Any, backend: str, batch: Batch) -> None:
    """Lightning clips in the closure that it makes. Half of each gradient is that of half the loss."""
    optimizer, halved = make(rule, backend, mc_samples=3), make(rule, backend, mc_samples=3)

    def clipping() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(optimizer, batch)
        loss.backward()
        replace(optimizer.model)
        return loss

    def half() -> Tensor:
        halved.zero_grad()
        loss = 0.5 * loss_of(halved, batch)
        loss.backward()
        return loss

    optimizer.step(clipping)
    halved.step(half)
    compared = list(zip(end(optimizer), end(halved), strict=True))
    for a, b in compared if rule in (Vadam, MeanFieldVI) else compared[:4]:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


class TestSeveralPasses:
    """p.grad has their sum, which is c N times the mean as long as each sample weighs c in all of them."""

    def run(self, optimizer: Any, batch: Batch, parts: list[slice], reduction: str, *, apart: bool) -> None:
        x, y = batch
        for part in parts if apart else [None]:
            with optimizer.sampled_params(train=True, loss_reduction=reduction):
                for rows in [part] if apart else parts:
                    loss_of(optimizer, (x[rows], y[rows]), reduction).backward()

    @pytest.mark.parametrize("backend", ["fused", "hooks", "loop"])
    @pytest.mark.parametrize("apart", [False, True], ids=["in one block", "in blocks of their own"])
    @pytest.mark.parametrize(
        ("parts", "reduction"),
        [([slice(0, 3), slice(3, 6)], "mean"), ([slice(0, 1), slice(1, 6)], "sum"), ([slice(0, 6)], "sum")],
    )
    def test_of_the_same_weight(
        self, backend: str, apart: bool, parts: list[slice], reduction: str, batch: Batch
    ) -> None:
        optimizer, plain = make(OGN, backend), make(OGN, backend)
        for one in (optimizer, plain):
            self.run(one, batch, parts, reduction, apart=apart)
        for p in optimizer.model.parameters():
            p.grad *= 0.25
        means = {name: mean * 0.25 for name, mean in plain._pending.observations.gradient().items()}
        optimizer.step()
        plain._pending.observations.parts[0].moments.mean.update(means)
        plain.step()
        assert_same(optimizer, plain)

    @pytest.mark.parametrize("apart", [False, True])
    def test_of_other_weights_are_refused(self, apart: bool, batch: Batch) -> None:
        optimizer = make()
        self.run(optimizer, batch, [slice(0, 1), slice(1, 6)], "mean", apart=apart)
        replace(optimizer.model)
        with pytest.raises(UsageError, match=r"p\.grad was changed.*different sizes.*max_grad_norm"):
            optimizer.step()
        optimizer.zero_grad()
        by_context(optimizer, *batch)

    def test_between_the_passes_of_one_block_is_refused(self, batch: Batch) -> None:
        x, y = batch

        def run(optimizer: Any) -> None:
            with optimizer.sampled_params(train=True):
                loss_of(optimizer, (x[:3], y[:3])).backward()
                replace(optimizer.model)
                loss_of(optimizer, (x[3:], y[3:])).backward()

        for rule, backend in ((VOGN, "fused"), (VOGN, "loop"), (Vadam, "")):
            with pytest.raises(UsageError, match=r"p\.grad was changed between two backward passes"):
                run(make(rule, backend))

    def test_emptied_between_the_passes_all_count(self, batch: Batch) -> None:
        x, y = batch
        optimizer, whole = make(), make()
        with optimizer.sampled_params(train=True):
            for rows in (slice(0, 3), slice(3, 6)):
                optimizer.model.zero_grad(set_to_none=rows.start == 0)
                loss_of(optimizer, (x[rows], y[rows])).backward()
        by_context(whole, *batch)
        optimizer.step()
        assert_same(optimizer, whole)

    def test_between_two_blocks(self, batch: Batch) -> None:
        """The first block's gradient is what the user made of it, then come those of the second."""
        optimizer, plain = make(OGN), make(OGN)
        for one in (optimizer, plain):
            with one.sampled_params(train=True):
                loss_of(one, batch).backward()
            if one is optimizer:
                replace(one.model)
            with one.sampled_params(train=True):
                loss_of(one, batch).backward()
        optimizer.step()
        mean = plain._pending.observations.parts[0].moments.mean
        mean.update({name: 0.75 * value for name, value in mean.items()})
        plain.step()
        assert_same(optimizer, plain)

    @pytest.mark.parametrize("rule", [Vadam, MeanFieldVI])
    def test_of_several_draws_that_are_kept_apart_are_refused(self, rule: Any, batch: Batch) -> None:
        optimizer = make(rule)
        for _ in range(2):
            with optimizer.sampled_params(train=True):
                loss_of(optimizer, batch).backward()
        replace(optimizer.model)
        with pytest.raises(UsageError, match=r"several draws"):
            optimizer.step()

    def test_beside_an_observed_batch_is_refused(self, batch: Batch) -> None:
        optimizer = make()
        optimizer.observe(*batch)
        with optimizer.sampled_params(train=True):
            loss_of(optimizer, batch).backward()
        replace(optimizer.model)
        with pytest.raises(UsageError, match=r"observe\(\) contributed"):
            optimizer.step()

    def test_on_top_of_something_else_is_refused(self, batch: Batch) -> None:
        optimizer = make()
        optimizer.model[0].weight.grad = torch.ones(4, 3, dtype=torch.float64)
        with pytest.warns(UnusedGradientWarning), optimizer.sampled_params(train=True):
            loss_of(optimizer, batch).backward()
        replace(optimizer.model)
        with pytest.raises(UsageError, match="it was not empty before"):
            optimizer.step()


class TestGone:
    @pytest.mark.parametrize(
        ("rule", "backend"), [(VOGN, "fused"), (VOGN, "loop"), (IVON, ""), (Vadam, ""), (MeanFieldVI, "")]
    )
    def test_set_to_none_a_parameter_is_not_updated(self, rule: Any, backend: str, batch: Batch) -> None:
        optimizer, plain = make(rule, backend), make(rule, backend)
        with optimizer.sampled_params(train=True):
            loss_of(optimizer, batch).backward()
        model = optimizer.model
        model[0].weight.grad, before = None, model[0].weight.detach().clone()
        optimizer.step()
        by_context(plain, *batch)
        assert torch.equal(model[0].weight, before)
        assert optimizer.state[model[0].weight]["step"] == 0
        assert torch.equal(model[2].weight, plain.model[2].weight)

    @pytest.mark.parametrize("to_none", [True, False])
    def test_emptied_before_the_step_is_refused(self, to_none: bool, batch: Batch) -> None:
        optimizer = make()
        with optimizer.sampled_params(train=True):
            loss_of(optimizer, batch).backward()
        optimizer.model.zero_grad(set_to_none=to_none)
        with pytest.raises(UsageError, match=r"p\.grad was emptied.*after step\(\)"):
            optimizer.step()

        def closure() -> None:
            loss_of(optimizer, batch).backward()
            optimizer.zero_grad(set_to_none=to_none)

        with pytest.raises(UsageError, match=r"p\.grad was emptied"):
            optimizer.step(closure)

    def test_a_loss_whose_gradient_is_zero_is_no_such_case(self, batch: Batch) -> None:
        optimizer = make()
        with optimizer.sampled_params(train=True):
            (0.0 * loss_of(optimizer, batch)).backward()
        optimizer.step()


class TestGradientScalers:
    def scaled(self, batch: Batch, scale: float = 1024.0) -> tuple[Any, Any]:
        optimizer, scaler = (
            make(model=network(torch.float32)),
            torch.amp.GradScaler(torch.get_default_device().type, init_scale=scale),
        )
        with optimizer.sampled_params(train=True, grad_scaler=scaler):
            scaler.scale(loss_of(optimizer, (batch[0].float(), batch[1]))).backward()
        return optimizer, scaler

    def plain(self, batch: Batch, **settings: Any) -> Any:
        plain = make(model=network(torch.float32), **settings)
        by_context(plain, batch[0].float(), batch[1])
        return plain

    def close(self, one: Any, other: Any) -> None:
        for a, b in zip(end(one), end(other), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("scale", [1024.0, 1000.0])
    def test_unscaled_and_clipped(self, scale: float, batch: Batch) -> None:
        optimizer, scaler = self.scaled(batch, scale)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(optimizer.model.parameters(), 0.05)
        scaler.step(optimizer)
        self.close(optimizer, self.plain(batch, max_grad_norm=0.05))

    @pytest.mark.parametrize("scale", [1024.0, 1000.0])
    def test_unscaled_by_hand(self, scale: float, batch: Batch) -> None:
        for through_scaler in (True, False):
            optimizer, scaler = self.scaled(batch, scale)
            for p in optimizer.model.parameters():
                p.grad /= scale
            if through_scaler:
                scaler.step(optimizer)
            else:
                optimizer.step()
            self.close(optimizer, self.plain(batch))

    def test_changed_while_scaled_is_refused(self, batch: Batch) -> None:
        for through_scaler in (True, False):
            optimizer, scaler = self.scaled(batch)
            nn.utils.clip_grad_norm_(optimizer.model.parameters(), 0.05)
            with pytest.raises(UsageError, match=r"call scaler\.unscale_\(optimizer\) first"):
                scaler.step(optimizer) if through_scaler else optimizer.step()

    def test_an_overflow_is_no_change(self, batch: Batch) -> None:
        optimizer, scaler = self.scaled(batch, 3e38)
        with optimizer.sampled_params(train=True, grad_scaler=scaler):
            scaler.scale(1e3 * loss_of(optimizer, (batch[0].float(), batch[1]))).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        assert (optimizer.steps, optimizer.skipped_steps) == (0, 1)


class TestUnused:
    """What is in p.grad without a recorded pass is said not to be used, once."""

    @pytest.mark.parametrize(
        ("rule", "backend"), [(VOGN, "fused"), (OGN, "loop"), (IVON, ""), (Vadam, ""), (MeanFieldVI, "")]
    )
    def test_beside_observe(self, rule: Any, backend: str, batch: Batch) -> None:
        optimizer = make(rule, backend)
        optimizer.observe(*batch)
        penalise(optimizer.model)
        with pytest.warns(UnusedGradientWarning, match=r"observe\(\) does not read p\.grad"):
            optimizer.step()
        optimizer.observe(*batch)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()

    def test_before_a_block(self, batch: Batch) -> None:
        optimizer = make()
        penalise(optimizer.model)
        with pytest.warns(UnusedGradientWarning, match="after such a block"):
            by_context(optimizer, *batch)

    @pytest.mark.parametrize("rule", [VOGN, Vadam])
    def test_gradients_of_earlier_steps_are_not_spoken_of(self, rule: Any, batch: Batch) -> None:
        optimizer = make(rule)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for step in range(4):  # never emptied
                with optimizer.sampled_params(train=True):
                    loss_of(optimizer, batch).backward()
                if step == 0:
                    replace(optimizer.model)
                optimizer.step()
            optimizer.observe(*batch)
            optimizer.step()


@pytest.mark.parametrize("rule", [VOGN, MeanFieldVI])
def test_copied_pickled_and_loaded_it_goes_on_with_what_was_recorded(rule: Any, batch: Batch) -> None:
    """Copies of parameters have no p.grad, and a saved state has none."""
    optimizer = make(rule)
    with optimizer.sampled_params(train=True):
        loss_of(optimizer, batch).backward()
    loaded = make(rule)
    loaded.load_state_dict(optimizer.state_dict())
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)), loaded]
    optimizer.step()
    for other in copies:
        other.step()
        assert_same(other, optimizer)


@pytest.mark.parametrize(("rule", "backend"), RULES)
def test_hooks_that_run_after_the_gradient_was_accumulated(rule: Any, backend: str, batch: Batch) -> None:
    """They are called by all backends, and what they make of p.grad counts."""
    optimizer, called = make(rule, backend), []

    def halve(p: Tensor) -> None:
        called.append(p)
        p.grad.mul_(0.5)

    handles = [p.register_post_accumulate_grad_hook(halve) for p in optimizer.model.parameters()]
    with optimizer.sampled_params(train=True):
        loss_of(optimizer, batch).backward()
    optimizer.step()
    for handle in handles:
        handle.remove()
    assert len(called) == 4
    assert_same(optimizer, given(rule, backend, batch, replace))


def test_frozen_and_left_out_parameters_are_passed_over(batch: Batch) -> None:
    model = network()
    optimizer = make(model=model, params=model[2].parameters())
    with optimizer.sampled_params(train=True):
        loss_of(optimizer, batch).backward()
    model[0].weight.grad *= 5
    model[2].bias.requires_grad_(False)
    model[2].bias.grad = None
    optimizer.step()
    assert optimizer.steps == 1


@pytest.mark.parametrize(
    ("rule", "backend"), [(VOGN, "fused"), (VOGN, "loop"), (IVON, ""), (Vadam, ""), (MeanFieldVI, "")]
)
@pytest.mark.parametrize("change", [None, mask])
def test_the_model_may_be_cast_before_the_step(rule: Any, backend: str, change: Change | None, batch: Batch) -> None:
    optimizer, uncast = make(rule, backend), make(rule, backend)
    for one in (optimizer, uncast):
        with one.sampled_params(train=True):
            loss_of(one, batch).backward()
        if one is optimizer:
            one.model.float()
        if change is not None:
            change(one.model)
        one.step()
    for p, q in zip(optimizer.model.parameters(), uncast.model.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_in_low_precision(dtype: torch.dtype, batch: Batch) -> None:
    optimizer, unchanged = (make(model=network(dtype)) for _ in range(2))
    x, y = batch[0].to(dtype), batch[1]
    for one in (optimizer, unchanged):
        with one.sampled_params(train=True):
            loss_of(one, (x, y)).backward()
    mask(optimizer.model)
    before = optimizer.model[0].weight.detach().clone()
    optimizer.step()
    unchanged.step()
    moved = before - optimizer.model[0].weight.detach()
    assert moved[:, 0].abs().max() < 0.01  # the prior's part
    torch.testing.assert_close(optimizer.model[0].weight[:, 1:], unchanged.model[0].weight[:, 1:])
