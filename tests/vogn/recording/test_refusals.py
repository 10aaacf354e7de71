"""What happens inside `sampled_params(train=True)` that cannot be recorded, and that nothing remains of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persample import backends
from persample.errors import OptionError, UnsupportedModelError, UsageError
from persample.vogn import IVON, MeanFieldVI, Vadam, VariationalOptimizer, core

from ..ways import RECORDING, RULES_AND_BACKENDS, Batch, by_closure, by_context, make, network


@pytest.mark.parametrize(("rule", "backend"), RULES_AND_BACKENDS)
class TestRefusals:
    """Each leaves the mean, what was observed before, and no hook behind."""

    @pytest.fixture(autouse=True)
    def _nothing_happened(self, rule: Any, backend: str, batch: Batch) -> Any:
        self.optimizer = make(rule, backend)
        self.x, self.y = batch
        model = self.optimizer.model
        before = [p.detach().clone() for p in model.parameters()]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        modes = torch.overrides._len_torch_function_stack()  # type: ignore[attr-defined]
        yield
        assert not self.optimizer._pending.observations.parts
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
        assert all(not p._backward_hooks for p in model.parameters())
        assert torch.overrides._len_torch_function_stack() == modes  # type: ignore[attr-defined]
        for p, value in zip(model.parameters(), before, strict=True):
            assert torch.equal(p, value)
        by_context(self.optimizer, self.x, self.y)  # and it works afterwards

    def loss(self) -> Tensor:
        return F.cross_entropy(self.optimizer.model(self.x), self.y)

    def test_no_forward_pass(self) -> None:
        with pytest.raises(UsageError, match="the model was not called"), self.optimizer.sampled_params(train=True):
            pass

    def test_no_backward_pass(self) -> None:
        with pytest.raises(UsageError, match="no backward pass"), self.optimizer.sampled_params(train=True):
            self.loss()

    def test_a_second_backward_pass_through_the_same_forward_pass(self) -> None:
        def twice() -> None:
            loss = self.loss()
            loss.backward(retain_graph=True)
            loss.backward()

        with pytest.raises(UsageError, match="second backward pass"), self.optimizer.sampled_params(train=True):
            twice()

    def test_a_backward_pass_through_an_earlier_forward_pass(self) -> None:
        def late() -> None:
            loss = self.loss()
            self.optimizer.model(self.x)
            loss.backward()

        with pytest.raises(UsageError, match="earlier call of the model"), self.optimizer.sampled_params(train=True):
            late()

    def test_a_penalty_in_a_backward_pass_of_its_own(self) -> None:
        def apart() -> None:
            self.loss().backward()
            penalty(self.optimizer).backward()

        with (
            pytest.raises((UsageError, UnsupportedModelError), match=r"without going|outside the call"),
            self.optimizer.sampled_params(train=True),
        ):
            apart()

    @pytest.mark.parametrize(("due", "said"), [("sum", "mean"), ("mean", "sum")])
    def test_another_reduction_than_announced(self, due: Any, said: Any) -> None:
        for loss in (
            lambda z: F.cross_entropy(z, self.y, reduction=due),
            lambda z: getattr(F.cross_entropy(z, self.y, reduction="none"), due)(),
        ):
            with (
                pytest.raises(UsageError, match=f'Say loss_reduction="{due}"'),
                self.optimizer.sampled_params(train=True, loss_reduction=said),
            ):
                loss(self.optimizer.model(self.x)).backward()

    def test_one_backward_pass_through_two_forward_passes(self) -> None:
        with pytest.raises(UsageError, match="earlier call of the model"), self.optimizer.sampled_params(train=True):
            (self.loss() + self.loss()).backward()

    @pytest.mark.parametrize("arguments", [{"create_graph": True}, {"inputs": []}])
    def test_backward_passes_of_other_kinds(self, arguments: Any) -> None:
        with pytest.raises(UsageError, match=r"call loss\.backward\(\)"), self.optimizer.sampled_params(train=True):
            self.loss().backward(**arguments)

    def test_an_exception_in_the_block(self) -> None:
        def blow_up() -> None:
            with self.optimizer.sampled_params(train=True):
                self.loss().backward()
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            blow_up()

    def test_an_exception_in_a_closure(self) -> None:
        self.optimizer.mc_samples, calls = 2, []

        def closure() -> Tensor:
            calls.append(1)
            loss = self.loss()
            loss.backward()
            if len(calls) == 2:
                raise KeyboardInterrupt
            return loss

        with pytest.raises(KeyboardInterrupt):
            self.optimizer.step(closure)

    def test_other_reductions(self) -> None:
        with (
            pytest.raises(OptionError, match="loss_reduction='median'"),
            self.optimizer.sampled_params(train=True, loss_reduction="median"),
        ):
            self.loss().backward()

    @pytest.mark.parametrize("call", ["observe", "step", "sampled_params"])
    def test_nested_use(self, call: str) -> None:
        def nested() -> None:
            with self.optimizer.sampled_params(train=True):
                if call == "observe":
                    self.optimizer.observe(self.x, self.y)
                elif call == "step":
                    self.optimizer.step()
                else:
                    with self.optimizer.sampled_params():
                        pass

        with pytest.raises(UsageError, match="inside"):
            nested()


def penalty(optimizer: VariationalOptimizer) -> Tensor:
    return torch.stack([p.square().sum() for p in optimizer.model.parameters()]).sum()


def penalised(optimizer: VariationalOptimizer, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(optimizer.model(x), y) + penalty(optimizer)


def weight_norm(optimizer: VariationalOptimizer) -> Tensor:
    return torch.cat([p.flatten() for p in optimizer.model.parameters()]).norm(1)


def towards(optimizer: VariationalOptimizer) -> Tensor:
    """As in EWC: towards earlier values, by their Fisher information."""
    pairs = [(p, torch.ones_like(p), torch.rand_like(p)) for p in optimizer.model.parameters()]
    return sum(((p - old).square() * fisher).sum() for p, old, fisher in pairs)  # type: ignore[return-value]


def add_in_place(optimizer: VariationalOptimizer, loss: Tensor) -> Tensor:
    loss += 0.1 * penalty(optimizer)
    return loss


PENALTIES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "L2": lambda optimizer, loss: loss + 0.1 * penalty(optimizer),
    "L1": lambda optimizer, loss: loss + 0.1 * weight_norm(optimizer),
    "EWC": lambda optimizer, loss: loss + towards(optimizer),
    "of one layer": lambda optimizer, loss: loss + optimizer.model[2].weight.abs().sum(),
    "first": lambda optimizer, loss: optimizer.model[2].weight.square().mean() + loss,
    "in a stack": lambda optimizer, loss: torch.stack([loss, penalty(optimizer).to(loss)]).sum(),
    "in place": add_in_place,
}


def contrastive(outputs: Tensor) -> Tensor:
    """Every sample is compared with all others."""
    embedded = F.normalize(outputs)
    return F.cross_entropy(embedded @ embedded.T, torch.arange(len(outputs)))


@pytest.mark.parametrize("backend", RECORDING)
class TestWhatIsNotTheModelsForwardPass:
    def test_a_part_of_the_model_called_by_itself(self, backend: str, batch: Batch) -> None:
        x, y = batch
        optimizer = make(backend=backend)
        with pytest.raises((UsageError, UnsupportedModelError)), optimizer.sampled_params(train=True):
            F.cross_entropy(optimizer.model[2](torch.tanh(optimizer.model[0](x))), y).backward()

    def test_parts_alone(self, backend: str, batch: Batch) -> None:
        """As of a LightningModule whose training_step() calls a part of it."""
        x, y = batch
        model = nn.ModuleDict({"net": network()})
        optimizer = make(backend=backend, model=model)
        with (
            pytest.raises(
                UsageError, match=r"the model was not called.*training_step.*pass that part: VOGN\(self\.net"
            ),
            optimizer.sampled_params(train=True),
        ):
            F.cross_entropy(model["net"](x), y).backward()

    @pytest.mark.parametrize("kind", PENALTIES)
    def test_a_penalty_on_the_weights(self, backend: str, kind: str, batch: Batch) -> None:
        """The reason is named, and no other backend recommended, because all refuse it."""
        x, y = batch
        optimizer = make(backend=backend)
        for size in (6, 1):
            with (
                pytest.raises(UnsupportedModelError, match=r"outside the call of the model.*penalty") as caught,
                optimizer.sampled_params(train=True),
            ):
                PENALTIES[kind](optimizer, F.cross_entropy(optimizer.model(x[:size]), y[:size])).backward()
            assert "se backend" not in str(caught.value)
            assert "after the block, before step()" in str(caught.value)

    def test_a_penalty_made_before_the_block(self, backend: str, batch: Batch) -> None:
        x, y = batch
        optimizer = make(backend=backend)
        made = penalty(optimizer)
        with (
            pytest.raises(UnsupportedModelError, match=r"outside the call of the model.*penalty"),
            optimizer.sampled_params(train=True),
        ):
            (F.cross_entropy(optimizer.model(x), y) + made).backward()

    @pytest.mark.parametrize("kind", [key for key in PENALTIES if "in place" not in key])
    def test_the_advice_works_a_penalty_after_the_block(self, backend: str, kind: str, batch: Batch) -> None:
        """Its gradient at the mean is added to that of the loss."""
        x, y = batch
        optimizer = make(backend=backend)
        with optimizer.sampled_params(train=True):
            F.cross_entropy(optimizer.model(x), y).backward()
        expected = {name: g.clone() for name, g in optimizer._pending.observations.gradient().items()}
        added = PENALTIES[kind](optimizer, torch.zeros(()))
        parameters = dict(optimizer.model.named_parameters())
        gradients = torch.autograd.grad(added, list(parameters.values()), retain_graph=True, allow_unused=True)
        added.backward()
        optimizer._take_changes(at_the_step=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            due = expected[name] if gradient is None else expected[name] + gradient
            torch.testing.assert_close(optimizer._pending.observations.gradient()[name], due)
        optimizer.step()

    def test_torch_autograd_grad(self, backend: str, batch: Batch) -> None:
        x, y = batch

        def residual(model: nn.Module) -> None:
            inputs = x.clone().requires_grad_()
            outputs = model(inputs)
            by_inputs = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)[0]
            (by_inputs.square().sum() + F.cross_entropy(outputs, y)).backward()

        def assigned(model: nn.Module) -> None:
            parameters = list(model.parameters())
            for p, g in zip(parameters, torch.autograd.grad(F.cross_entropy(model(x), y), parameters), strict=True):
                p.grad = g

        def of_a_penalty(model: nn.Module) -> None:
            torch.autograd.grad(torch.stack([p.square().sum() for p in model.parameters()]).sum(), model[0].weight)

        def of_the_losses(model: nn.Module) -> None:
            torch.autograd.grad([loss.mean() for loss in model(x)], model[0].weight)

        for run in (residual, assigned, of_a_penalty, of_the_losses):
            optimizer = make(backend=backend)
            with (
                pytest.raises(UsageError, match=r"^torch\.autograd\.grad was called.*loss\.backward\(\)"),
                optimizer.sampled_params(train=True),
            ):
                run(optimizer.model)

    def test_torch_autograd_grad_of_something_else_is_let_be(self, backend: str, batch: Batch) -> None:
        x, y = batch
        optimizer, plain = make(backend=backend), make(backend=backend)
        with optimizer.sampled_params(train=True):
            other = torch.ones(3, requires_grad=True)
            (gradient,) = torch.autograd.grad(other.square().sum(), other)
            assert torch.equal(gradient, torch.full((3,), 2.0))
            F.cross_entropy(optimizer.model(x), y).backward()
        optimizer.step()
        by_context(plain, x, y)
        assert torch.equal(optimizer.model[0].weight, plain.model[0].weight)

    def test_layers_that_mix_the_samples(self, backend: str, batch: Batch) -> None:
        if backend == "opacus":
            pytest.skip("refuses BatchNorm in every mode")
        model = network()
        model.append(nn.BatchNorm1d(2).double())
        optimizer = make(backend=backend, model=model)
        with pytest.raises(UnsupportedModelError, match="BatchNorm1d '3' is in training mode"):
            by_closure(optimizer, *batch)
        model.eval()
        by_closure(optimizer, *batch)


@pytest.mark.parametrize("rule", [IVON, Vadam, MeanFieldVI])
def test_first_order_rules_take_penalties_and_parts_as_they_come(rule: Any, batch: Batch) -> None:
    """They need the gradient of the batch's loss only, whatever it is made of."""
    x, y = batch
    optimizer = make(rule)
    with optimizer.sampled_params(train=True):
        penalised(optimizer, x, y).backward()
        expected = optimizer.model[0].weight.grad.clone()
    torch.testing.assert_close(optimizer._pending.observations.gradient()["0.weight"], expected)


def test_a_prior_is_an_l2_penalty(batch: Batch) -> None:
    """As the refusal says: w Σ θ² beside a mean loss is prior_precision = 2 w N."""
    leaves = list(network().parameters())
    (0.3 * torch.stack([p.square().sum() for p in leaves]).sum()).backward()
    means = [p.detach() for p in leaves]
    zeros = [torch.zeros_like(m) for m in means]
    by_prior = core.add_prior(zeros, means, data_size=100, prior_precision=2 * 0.3 * 100)
    for gradient, leaf in zip(by_prior, leaves, strict=True):
        torch.testing.assert_close(gradient, leaf.grad)


class DifferentiatesItself(nn.Module):
    """Returns derivatives by its inputs beside its outputs, as the refusal of `torch.autograd.grad` says."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            outputs = self.net(x)
            return outputs, torch.autograd.grad(outputs.sum(), x, create_graph=True)[0]


def residual_loss(outputs: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    return F.cross_entropy(outputs[0], y, reduction="none") + outputs[1].square().sum(1)


@pytest.mark.parametrize(("rule", "backend"), RULES_AND_BACKENDS)
def test_derivatives_by_inputs_are_served_in_the_forward_pass_or_the_backend_says_which_serves_them(
    rule: Any, backend: str, batch: Batch
) -> None:
    x, y = batch
    if backend and (problem := backends()[backend].problem):
        pytest.skip(problem)
    settings = {"backend": backend, "hess_init": 0.5} if backend else {}
    for way in ("observe", "block"):
        optimizer = rule(DifferentiatesItself(), residual_loss, data_size=100, **settings)

        def run(optimizer: Any = optimizer, way: str = way) -> None:
            if way == "observe":
                optimizer.observe(x, y)
            else:
                with optimizer.sampled_params(train=True):
                    residual_loss(optimizer.model(x), y).mean().backward()
            optimizer.step()

        if backend in ("", "loop", "vmap"):
            run()
        else:
            with contextlib.suppress(UnsupportedModelError):
                run()
