"""What happens inside `sampled_params(train=True)` that cannot be recorded, and that nothing remains of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persample.errors import OptionError, UnsupportedModelError, UsageError
from persample.vogn import MeanFieldVI, Vadam, VariationalOptimizer

from .ways import RECORDING, RULES_AND_BACKENDS, Batch, by_closure, by_context, make, network


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
        yield
        assert not self.optimizer._observations.parts
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
        assert all(not p._backward_hooks for p in model.parameters())
        assert torch.overrides._len_torch_function_stack() == 0  # type: ignore[attr-defined]
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

        with pytest.raises(UsageError, match="not the last one"), self.optimizer.sampled_params(train=True):
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
        with pytest.raises(UsageError, match="not the last one"), self.optimizer.sampled_params(train=True):
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

    def test_a_penalty_on_the_weights(self, backend: str, batch: Batch) -> None:
        x, y = batch
        optimizer = make(backend=backend)
        for size in (6, 1):
            with pytest.raises(UnsupportedModelError), optimizer.sampled_params(train=True):
                penalised(optimizer, x[:size], y[:size]).backward()

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


@pytest.mark.parametrize("rule", [Vadam, MeanFieldVI])
def test_first_order_rules_take_penalties_and_parts_as_they_come(rule: Any, batch: Batch) -> None:
    """They need the gradient of the batch's loss only, whatever it is made of."""
    x, y = batch
    optimizer = make(rule)
    with optimizer.sampled_params(train=True):
        penalised(optimizer, x, y).backward()
        expected = optimizer.model[0].weight.grad.clone()
    torch.testing.assert_close(optimizer._observations.gradient()["0.weight"], expected)
