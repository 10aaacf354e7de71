"""Three ways to observe, one state: `observe`, `sampled_params(train=True)`, and `step(closure)`."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persample.errors import UsageError
from persample.testing.devices import generator_of
from persample.vogn import IVON, OGN, VOGN, LossReductionWarning, MeanFieldVI, Vadam, VariationalOptimizer

from ..ways import RECORDING, RULES_AND_BACKENDS, Batch, Observe, by_closure, by_context, by_observing, make, network


def ends(optimizer: VariationalOptimizer, observe: Observe, batch: Batch) -> list[Tensor]:
    for _ in range(4):
        observe(optimizer, *batch)
    assert optimizer.generator is not None
    return [
        *(p.detach().clone() for p in optimizer.model.parameters()),
        *optimizer._precision(),
        optimizer.generator.get_state(),
    ]


@pytest.mark.parametrize("observe", [by_context, by_closure])
@pytest.mark.parametrize("mc_samples", [1, 3])
@pytest.mark.parametrize(
    ("rule", "backend"),
    [*((VOGN, backend) for backend in RECORDING), (OGN, "fused"), (IVON, ""), (Vadam, ""), (MeanFieldVI, "")],
)
def test_all_ways_are_one(rule: Any, backend: str, observe: Observe, mc_samples: int, batch: Batch) -> None:
    """The same draws from the same generator, the same posterior, and the generator is left alike."""
    expected = ends(make(rule, backend, mc_samples=mc_samples), by_observing, batch)
    actual = ends(make(rule, backend, mc_samples=mc_samples), observe, batch)
    for value, due in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, due, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("backend", RECORDING)
class TestReductions:
    def test_a_sum_is_a_sum(self, backend: str, batch: Batch) -> None:
        x, y = batch
        summed, averaged = make(backend=backend), make(backend=backend)
        with summed.sampled_params(train=True, loss_reduction="sum"):
            F.cross_entropy(summed.model(x), y, reduction="sum").backward()
        averaged.observe(x, y)
        for optimizer in (summed, averaged):
            optimizer.step()
        for p, q in zip(summed.model.parameters(), averaged.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)

    def test_the_optimizers_own_is_the_default(self, backend: str, batch: Batch) -> None:
        x, y = batch
        summed, averaged = make(backend=backend, loss_reduction="sum"), make(backend=backend)
        summed.step(lambda: F.cross_entropy(summed.model(x), y, reduction="sum").backward())
        by_observing(averaged, x, y)
        torch.testing.assert_close(summed.model[0].weight, averaged.model[0].weight, rtol=1e-9, atol=1e-12)

    def test_p_grad_is_what_pytorch_leaves(self, backend: str, batch: Batch) -> None:
        x, y = batch
        for reduction in ("mean", "sum"):
            optimizer, generator = make(backend=backend), generator_of(2)
            optimizer.model[2].bias.grad = torch.ones(2, dtype=torch.float64)  # added to, as ever
            with optimizer.sampled_params(train=True, loss_reduction=reduction):
                F.cross_entropy(optimizer.model(x), y, reduction=reduction).backward()
                inside = [p.grad.clone() for p in optimizer.model.parameters()]
            with optimizer.sampled_params(generator=generator):
                loss = F.cross_entropy(optimizer.model(x), y, reduction=reduction)
                expected = torch.autograd.grad(loss, list(optimizer.model.parameters()))
            for name, p in optimizer.model.named_parameters():
                due = expected[[n for n, _ in optimizer.model.named_parameters()].index(name)]
                torch.testing.assert_close(p.grad, due + (1 if name == "2.bias" else 0))
            torch.testing.assert_close(inside, [p.grad for p in optimizer.model.parameters()], rtol=0, atol=0)

    def test_a_mean_over_fewer_samples_is_warned_of(self, backend: str, batch: Batch) -> None:
        x, y = batch
        optimizer = make(backend=backend)
        with pytest.warns(LossReductionWarning, match="on 2 of the 6 samples"), optimizer.sampled_params(train=True):
            F.cross_entropy(optimizer.model(x)[:4], y[:4]).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with optimizer.sampled_params(train=True, loss_reduction="sum"):
                F.cross_entropy(optimizer.model(x)[:4], y[:4], reduction="sum").backward()


@pytest.mark.parametrize(("rule", "backend"), RULES_AND_BACKENDS)
class TestAccumulation:
    def test_uneven_parts_in_one_block_are_the_batch(self, rule: Any, backend: str, batch: Batch) -> None:
        x, y = batch
        parted, whole = make(rule, backend), make(rule, backend)
        with parted.sampled_params(train=True):
            for part in (slice(0, 1), slice(1, 5), slice(5, 6)):
                F.cross_entropy(parted.model(x[part]), y[part]).backward()
        by_context(whole, x, y)
        parted.step()
        for p, q in zip(parted.model.parameters(), whole.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-10)

    def test_a_pass_without_gradients_or_backward_does_not_count(self, rule: Any, backend: str, batch: Batch) -> None:
        x, y = batch
        looking, whole = make(rule, backend), make(rule, backend)
        with looking.sampled_params(train=True):
            with torch.no_grad():
                looking.model(x[:2])
            F.cross_entropy(looking.model(x), y).backward()
            looking.model(x[:3]).argmax(1)
        by_context(whole, x, y)
        looking.step()
        for p, q in zip(looking.model.parameters(), whole.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-10)


class TestClosures:
    def test_the_loss_is_averaged_over_the_draws_and_returned(self, batch: Batch) -> None:
        returned, due = [], make(mc_samples=3).observe(*batch)
        for convert in (lambda loss: loss, lambda loss: loss.item()):
            optimizer = make(mc_samples=3)

            def closure(optimizer: Any = optimizer, convert: Any = convert) -> Any:
                loss = F.cross_entropy(optimizer.model(batch[0]), batch[1])
                loss.backward()
                return convert(loss)

            returned.append(optimizer.step(closure))
        torch.testing.assert_close(returned[0], due)
        assert returned[1] == pytest.approx(due.item())
        assert not returned[0].requires_grad

    def test_gradients_are_on_inside_and_zero_grad_forgets_no_draw(self, batch: Batch) -> None:
        optimizer = make(mc_samples=2)
        with torch.no_grad():
            by_closure(optimizer, *batch)
        assert optimizer.steps == 1
        expected = make(mc_samples=2)
        by_observing(expected, *batch)
        torch.testing.assert_close(optimizer.model[0].weight, expected.model[0].weight, rtol=1e-9, atol=1e-12)

    def test_outside_zero_grad_forgets(self, batch: Batch) -> None:
        optimizer = make()
        with optimizer.sampled_params(train=True):
            F.cross_entropy(optimizer.model(batch[0]), batch[1]).backward()
        optimizer.zero_grad()
        with pytest.raises(UsageError, match="Nothing was observed"):
            optimizer.step()

    @pytest.mark.parametrize(("rule", "backend"), RULES_AND_BACKENDS)
    @pytest.mark.parametrize("way", ["observe", "block"])
    @pytest.mark.parametrize("mc_samples", [1, 3])
    def test_one_that_does_nothing_steps_with_what_was_observed(
        self, rule: Any, backend: str, way: str, mc_samples: int, batch: Batch
    ) -> None:
        """Lightning's manual optimisation hands such a closure to every step. No noise is used up."""
        optimizer, plain = (make(rule, backend, mc_samples=mc_samples) for _ in range(2))
        calls: list[int] = []
        for _ in range(2):
            for one in (optimizer, plain):
                if way == "observe":
                    one.observe(*batch)
                else:
                    with one.sampled_params(train=True):
                        F.cross_entropy(one.model(batch[0]), batch[1]).backward()
            assert optimizer.step(lambda: calls.append(1)) is None
            plain.step()
            for one in (optimizer, plain):
                one.zero_grad()
        assert len(calls) == 2
        for p, q in zip(optimizer.model.parameters(), plain.model.parameters(), strict=True):
            assert torch.equal(p, q)
        assert torch.equal(optimizer.generator.get_state(), plain.generator.get_state())

    @pytest.mark.parametrize(("rule", "backend"), RULES_AND_BACKENDS)
    def test_one_that_does_nothing_is_refused_where_nothing_was_observed(self, rule: Any, backend: str) -> None:
        with pytest.raises(UsageError, match=r"the model was not called.*LightningModule"):
            make(rule, backend).step(lambda: None)

    def test_one_that_calls_another_model_is_refused_with_what_was_observed(self, batch: Batch) -> None:
        optimizer, other = make(), network()
        optimizer.observe(*batch)

        def closure() -> Tensor:
            loss = F.cross_entropy(other(batch[0]), batch[1])
            loss.backward()
            return loss

        with pytest.raises(UsageError, match="the model was not called"):
            optimizer.step(closure)
        optimizer.step()

    def test_one_that_calls_the_model_without_a_backward_pass_is_refused(self, batch: Batch) -> None:
        optimizer = make()
        optimizer.observe(*batch)

        def closure() -> None:
            optimizer.model(batch[0])

        with pytest.raises(UsageError, match="no backward pass followed"):
            optimizer.step(closure)

    def test_hooks_of_the_step_run(self, batch: Batch) -> None:
        optimizer, seen = make(), []
        optimizer.register_step_post_hook(lambda *_: seen.append(1))
        by_closure(optimizer, *batch)
        assert seen == [1]


def test_ways_can_be_mixed(batch: Batch) -> None:
    x, y = batch
    optimizer = make()
    optimizer.observe(x[:2], y[:2])
    with optimizer.sampled_params(train=True):
        F.cross_entropy(optimizer.model(x[2:]), y[2:]).backward()
    (part,) = optimizer._pending.observations.parts
    assert part.moments.batch_size == 6
    optimizer.step()


def test_what_waits_is_saved(batch: Batch) -> None:
    x, y = batch
    first, second = make(), make()
    with first.sampled_params(train=True):
        F.cross_entropy(first.model(x), y).backward()
    second.load_state_dict(first.state_dict())
    first.step()
    second.step()
    assert torch.equal(first.model[0].weight, second.model[0].weight)


@pytest.mark.parametrize("backend", RECORDING)
def test_frozen_and_unused_parameters(backend: str, batch: Batch) -> None:
    x, y = batch
    model = network()
    model[0].requires_grad_(False)
    if backend == "fused":
        model.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = make(backend=backend, model=model)
    before = model[0].weight.detach().clone()
    by_context(optimizer, x, y)
    assert torch.equal(model[0].weight, before)
    assert model[0].weight.grad is None
    if backend == "fused":
        assert model.unused.grad is None
        expected = 1 - 0.01 * (1 / 100) / (0.5 + 1 / 100)  # it follows the prior
        torch.testing.assert_close(model.unused.detach(), torch.full((2,), expected, dtype=torch.float64))


@pytest.mark.parametrize("backend", RECORDING)
def test_the_model_may_compute_the_loss_itself(backend: str, batch: Batch) -> None:
    """As models of transformers do: keyword arguments, targets among them, and several outputs."""

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    x, y = batch
    own, plain = make(backend=backend, model=WithLoss()), make(backend=backend)
    by_observing(plain, x, y)
    own.step(lambda: own.model(x=x, labels=y)["loss"].backward())
    torch.testing.assert_close(own.model.net[0].weight, plain.model[0].weight, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", [backend for backend in RECORDING if backend != "vmap"])  # it cannot run them
def test_activation_checkpointing(backend: str, batch: Batch) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.net[2](checkpoint(self.net[:2], x, use_reentrant=False))

    x, y = batch
    thrifty, plain = make(backend=backend, model=Checkpointed()), make(backend=backend)
    by_observing(plain, x, y)
    by_context(thrifty, x, y)
    torch.testing.assert_close(thrifty.model.net[0].weight, plain.model[0].weight, rtol=1e-9, atol=1e-12)
