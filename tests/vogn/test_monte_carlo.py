"""In one pass or one by one: the outputs are those under the same draws, and the model is left as it was."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persample import Posterior
from persample.errors import BatchError, OptionError, UsageError
from persample.vogn import VOGN
from persample.vogn.monte_carlo import for_each_draw

from .draws_by_hand import broad_posterior, outputs_by_hand, seeded

Batch = tuple[Tensor, Tensor]


def collect(model: nn.Module, posterior: Posterior, inputs: Any, **options: Any) -> list[Tensor]:
    parts: list[Tensor] = []
    for_each_draw(model, posterior, inputs, parts.append, **({"generator": seeded()} | options))
    return parts


class Dropped(nn.Sequential):
    """A net with a dropout layer that is on."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2))


class Counting(nn.Module):
    """BatchNorm in training mode: the forward pass changes buffers in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


class Branching(nn.Module):
    """Control flow that depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        return out if out.sum().item() > 0 else 2 * out


class Hidden(nn.Module):
    """A weight that the forward pass reaches past the module that holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        weight = self.linear.weight
        self.product = lambda x: F.linear(x, weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


class Tied(nn.Module):
    """One weight in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x.unsqueeze(2))[0].flatten(1)


MODELS = [Dropped, Counting, Branching, Hidden, Tied, Recurrent]


class TestInOnePass:
    """Whatever the model does: in one pass or one by one, the outputs are those under the same draws."""

    @pytest.mark.parametrize("make", [m for m in MODELS if m is not Dropped])
    def test_the_same_outputs_as_one_by_one(self, make: Callable[[], nn.Module]) -> None:
        torch.manual_seed(0)
        model = make().double()
        posterior = broad_posterior(model)
        x = torch.randn(5, 3, dtype=torch.float64)
        expected = outputs_by_hand(model, posterior, x, 9)
        outputs = torch.cat(collect(model, posterior, x, samples=9, draws_at_once=4))
        np.testing.assert_allclose(outputs.numpy(force=True), expected, rtol=1e-11, atol=1e-11)

    def test_happens(self, model: nn.Module, batch: Batch) -> None:
        sizes = [len(part) for part in collect(model, broad_posterior(model), batch[0], samples=9, draws_at_once=4)]
        assert sizes == [1, 4, 4]

    @pytest.mark.parametrize("make", [Dropped, Counting, Branching, Hidden])
    def test_does_not_happen_where_it_would_be_wrong(self, make: Callable[[], nn.Module]) -> None:
        model = make()
        parts = collect(model, broad_posterior(model), torch.randn(5, 3), samples=9, draws_at_once=4)
        assert [len(part) for part in parts] == [1] * 9

    def test_dropout_draws_anew_for_each_draw(self) -> None:
        torch.manual_seed(0)
        model = Dropped()
        sure = broad_posterior(model)
        sure = Posterior(sure.mean, {name: p * 1e12 for name, p in sure.precision.items()}, model)
        outputs = torch.cat(collect(model, sure, torch.randn(5, 3), samples=6, draws_at_once=6))
        assert len({row.sum().item() for row in outputs}) == 6

    def test_buffers_change_once_for_each_draw(self) -> None:
        model = Counting()
        collect(model, broad_posterior(model), torch.randn(5, 3), samples=9, draws_at_once=4)
        assert model.norm.num_batches_tracked == 9

    def test_is_halved_until_memory_holds_it(self, model: nn.Sequential, batch: Batch) -> None:
        """A module that runs out of memory when it is asked for 8 draws, and for 4 of them."""

        class Small(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
                self.memory = SimpleNamespace(calls=0, fails=())  # no part of the state that is put back

            def forward(self, x: Tensor) -> Tensor:
                self.memory.calls += 1
                if self.memory.calls in self.memory.fails:
                    raise torch.OutOfMemoryError
                return x @ self.weight

        small = Small()
        posterior = broad_posterior(small)
        expected = outputs_by_hand(small, posterior, batch[0], 9)
        small.memory = SimpleNamespace(
            calls=0, fails=(3, 4)
        )  # after the ordinary pass and the comparison: 8 draws, then 4
        parts = collect(small, posterior, batch[0], samples=9, draws_at_once=8)
        assert [len(part) for part in parts] == [1, 2, 2, 4]
        np.testing.assert_allclose(torch.cat(parts).numpy(force=True), expected, rtol=1e-12)

    def test_works_in_inference_mode(self, model: nn.Module, batch: Batch) -> None:
        posterior = broad_posterior(model)
        with torch.inference_mode():
            parts = collect(model, posterior, batch[0], samples=3, draws_at_once=4)
        assert len(torch.cat(parts)) == 3

    @pytest.mark.parametrize("draws_at_once", [1, 4])
    def test_few_rows_at_once_change_nothing(self, draws_at_once: int, model: nn.Module, batch: Batch) -> None:
        posterior = broad_posterior(model)
        whole, parts = (
            torch.cat(collect(model, posterior, batch[0], samples=5, draws_at_once=draws_at_once, rows_at_once=rows))
            for rows in (None, 4)
        )
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)

    def test_no_rows_are_no_problem(self, model: nn.Module) -> None:
        empty = torch.zeros(0, 3, dtype=torch.float64)
        for rows in (None, 2):
            predicted = broad_posterior(model).predict(empty, samples=3, draws_at_once=3, rows_at_once=rows)
            assert predicted.probabilities.shape == (0, 2)


@pytest.mark.parametrize("draws_at_once", [1, 4])
def test_the_tensor_is_picked_out_of_what_the_model_returns(draws_at_once: int, model: nn.Module, batch: Batch) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inner(x), "other": x}

    named = Named()
    options: dict[str, Any] = {"samples": 5, "draws_at_once": draws_at_once, "rows_at_once": 4}
    picked = collect(named, broad_posterior(named), batch[0], pick=lambda output: output["logits"], **options)
    plain = collect(model, broad_posterior(model), batch[0], **options)
    assert torch.equal(torch.cat(picked), torch.cat(plain))
    with pytest.raises(UsageError, match="pick="):
        collect(named, broad_posterior(named), batch[0])


class TestTheModelIsAsBefore:
    @pytest.mark.parametrize("draws_at_once", [1, 4])
    def test_after_success(self, draws_at_once: int, model: nn.Module, batch: Batch) -> None:
        posterior = broad_posterior(model)
        before = [(p.detach().clone(), p.data_ptr(), p.requires_grad) for p in model.parameters()]
        with torch.no_grad():
            model[0].weight.add_(1.0)  # the posterior is not where the model is
            before[0] = (model[0].weight.clone(), *before[0][1:])
        collect(model, posterior, batch[0], samples=9, draws_at_once=draws_at_once)
        for p, (value, pointer, trained) in zip(model.parameters(), before, strict=True):
            assert torch.equal(p, value)
            assert (p.data_ptr(), p.requires_grad) == (pointer, trained)

    @pytest.mark.parametrize("draws_at_once", [1, 4])
    @pytest.mark.parametrize("after", [0, 1, 3])
    def test_when_the_consumer_fails(self, after: int, draws_at_once: int, model: nn.Module, batch: Batch) -> None:
        posterior = broad_posterior(model)
        before = [p.detach().clone() for p in model.parameters()]
        left = after

        def consume(outputs: Tensor) -> None:
            nonlocal left
            if left <= 0:
                raise ZeroDivisionError
            left -= len(outputs)

        with pytest.raises(ZeroDivisionError) as caught:
            for_each_draw(model, posterior, batch[0], consume, samples=9, draws_at_once=draws_at_once)
        assert caught.tb is not None  # the frames are alive, and the weights are back all the same
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))

    def test_and_the_optimizer_is_free_again(self, vogn: VOGN, batch: Batch) -> None:
        with pytest.raises(RuntimeError):
            vogn.predict(torch.zeros(2, 7, dtype=torch.float64))
        vogn.predict(batch[0], samples=2)

    def test_while_draws_are_in_it_the_optimizer_is_not_saved(self, vogn: VOGN, model: nn.Module, batch: Batch) -> None:
        model.register_forward_hook(lambda *_: vogn.state_dict())
        with pytest.raises(UsageError, match="inside"):
            vogn.predict(batch[0])


class TestRefused:
    def test_another_model(self, model: nn.Module, batch: Batch) -> None:
        with pytest.raises(OptionError, match=r"'0\.weight' of shape \(4, 3\), which in this model is missing"):
            collect(nn.Linear(3, 2), broad_posterior(model), batch[0])
        with pytest.raises(OptionError, match=r"has shape \(2, 5\)"):
            collect(nn.Sequential(nn.Linear(5, 2)), broad_posterior(nn.Sequential(nn.Linear(3, 2))), batch[0])

    @pytest.mark.parametrize("option", ["samples", "draws_at_once", "rows_at_once"])
    @pytest.mark.parametrize("value", [0, -1, 1.5])
    def test_less_than_one(self, option: str, value: Any, vogn: VOGN, batch: Batch) -> None:
        with pytest.raises(OptionError, match=f"{option}="):
            vogn.predict(batch[0], **{option: value})

    def test_outputs_that_are_no_tensor(self, batch: Batch) -> None:
        class Pair(nn.Linear):
            def forward(self, x: Tensor) -> Any:
                return (super().forward(x),)

        with pytest.raises(UsageError, match="tuple"):
            broad_posterior(pair := Pair(3, 2).double()).predict(batch[0])
        assert pair.weight.requires_grad

    def test_inputs_of_another_type(self, model: nn.Module, batch: Batch) -> None:
        with pytest.raises(BatchError, match="list"):
            broad_posterior(model).predict([batch[0]])
