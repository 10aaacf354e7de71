"""Arguments that all samples share, or whose samples are in another dim, by all ways in and out of an optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import persample
from persample import batched, losses, shared
from persample.vogn import IVON, VOGN, MeanFieldVI, Vadam

from .draws_by_hand import seeded
from .ways import RULES_AND_BACKENDS, make

SIZE = 6


class Graph(nn.Module):
    """Two layers over the nodes of a graph, from a state (1, B, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()

    def forward(self, x: Tensor, edges: Tensor, state: Tensor) -> Tensor:
        outputs: Tensor = self.second((edges @ self.first(x)).tanh().mean(1) + state[0])
        return outputs


@pytest.fixture
def batch() -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    torch.manual_seed(1)
    inputs = torch.randn(SIZE, 5, 3), torch.rand(5, 5), torch.randn(1, SIZE, 4)
    return tuple(t.double() for t in inputs), torch.randint(2, (SIZE,))  # type: ignore[return-value]


def wrapped(inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Any, ...]:
    x, edges, state = inputs
    return x, shared(edges), batched(state, dim=1)


def step(way: str, optimizer: Any, inputs: Any, y: Tensor) -> None:
    def closure() -> Tensor:
        loss = F.cross_entropy(optimizer.model(*inputs), y)
        loss.backward()
        return loss

    if way == "observe":
        optimizer.observe(inputs, y)
        optimizer.step()
    elif way == "block":
        with optimizer.sampled_params(train=True):
            closure()
        optimizer.step()
    else:
        optimizer.step(closure)


@pytest.mark.parametrize("way", ["observe", "block", "closure"])
@pytest.mark.parametrize(("rule", "backend"), RULES_AND_BACKENDS)
def test_the_three_ways(rule: Any, backend: str, way: str, batch: Any) -> None:
    """Each trains as it does where the model holds the shared tensors itself, and the samples are in dim 0."""
    inputs, y = batch

    class Expanded(Graph):
        def forward(self, x: Tensor, state: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, inputs[1], state[None])

    torch.manual_seed(0)
    plain = make(rule, backend, Expanded())
    plain.observe((inputs[0], inputs[2][0]), y)
    plain.step()
    torch.manual_seed(0)
    optimizer = make(rule, backend, Graph())
    step(way, optimizer, wrapped(inputs), y)
    for name, expected in plain.model.named_parameters():
        torch.testing.assert_close(optimizer.model.get_parameter(name), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rows_at_once", [None, 4])
def test_predictions_and_bounds(rows_at_once: int | None, batch: Any) -> None:
    inputs, y = batch
    optimizer = VOGN(Graph(), losses.cross_entropy, data_size=50, hess_init=0.5)
    probabilities = optimizer.predict(
        wrapped(inputs), samples=3, generator=seeded(), rows_at_once=rows_at_once
    ).probabilities
    by_hand = optimizer.predict(inputs, samples=3, generator=seeded()).probabilities
    torch.testing.assert_close(probabilities, by_hand)
    with pytest.raises(persample.PersampleError, match=r"persample.shared\(tensor\)"):
        optimizer.predict(inputs, rows_at_once=4)
    elbo = optimizer.elbo(wrapped(inputs), y, samples=3, generator=seeded(), rows_at_once=rows_at_once)
    assert elbo.log_likelihoods.shape == (3,)


@pytest.mark.parametrize("rule", [IVON, Vadam, MeanFieldVI, VOGN])
def test_a_plain_tensor_in_the_block_is_refused_with_the_way_out(rule: Any, batch: Any) -> None:
    inputs, y = batch
    optimizer = make(rule, "fused", Graph())
    with (
        pytest.raises(persample.PersampleError, match=r"inputs\[1\] has 5: .*persample.shared\(tensor\)"),
        optimizer.sampled_params(train=True),
    ):
        F.cross_entropy(optimizer.model(*inputs), y).backward()


def test_in_the_checks(batch: Any) -> None:
    inputs, y = batch
    model = Graph().float()
    single = tuple(t.float() for t in inputs)
    assert all(agreement.agrees for agreement in persample.crosscheck(model, losses.cross_entropy, wrapped(single), y))
    explanation = persample.explain(model, wrapped(single), y, loss_fn=losses.cross_entropy)
    assert not explanation.refusals
    costs = persample.benchmark(model, losses.cross_entropy, wrapped(single), y, backends=["fused"], rounds=2)
    assert [cost.problem for cost in costs] == [None, None]
