"""Models that `torch.compile` has compiled: all backends see their operations, in all three ways to observe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from persample import VOGN, backends, losses
from persample.testing.devices import generator_of
from persample.vogn import Vadam

from .ways import PLAIN, RECORDING, Batch, by_closure, by_context, by_observing, make, network


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> Iterator[None]:
    yield
    torch.compiler.reset()


def compiled(model: nn.Module, how: str) -> nn.Module:
    if how == "in place":
        model.compile(backend="aot_eager")
        return model
    return torch.compile(model, backend="aot_eager")  # type: ignore[return-value]


@pytest.mark.parametrize("how", ["wrapped", "in place"])
@pytest.mark.parametrize("backend", RECORDING)
def test_moments_are_those_of_the_model_itself(backend: str, how: str, batch: Batch) -> None:
    if problem := backends()[backend].problem:
        pytest.skip(problem)
    plain, fast = make(backend=backend), make(backend=backend, model=compiled(network(), how))
    for observe in (by_observing, by_context, by_closure):
        observe(plain, *batch)
        observe(fast, *batch)
    for p, q in zip(fast.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_the_optimizer_may_have_the_model_itself_and_the_loop_the_compiled_one(batch: Batch) -> None:
    plain, fast = make(), make()
    called = torch.compile(fast.model, backend="aot_eager")
    with fast.sampled_params(train=True):
        torch.nn.functional.cross_entropy(called(batch[0]), batch[1]).backward()
    fast.step()
    by_observing(plain, *batch)
    torch.testing.assert_close(fast.model[0].weight, plain.model[0].weight, rtol=1e-9, atol=1e-12)


def test_what_was_compiled_stays_so(batch: Batch) -> None:
    """Outside of the optimizer the compiled code runs, at the weights of the moment."""
    runs = []

    def backend(graph: Any, inputs: list[Tensor]) -> Any:
        def run(*args: Tensor) -> Any:
            runs.append(1)
            return graph.forward(*args)

        return run

    model = network()
    fast = torch.compile(model, backend=backend)
    optimizer = make(model=fast)
    with torch.no_grad():
        fast(batch[0])
        by_observing(optimizer, *batch)
        assert len(runs) == 1
        torch.testing.assert_close(fast(batch[0]), model(batch[0]))
    assert len(runs) == 2


def test_first_order_rules_and_predictions(batch: Batch) -> None:
    plain, fast = make(Vadam), make(Vadam, model=compiled(network(), "wrapped"))
    for optimizer in (plain, fast):
        by_observing(optimizer, *batch)
    predicted = [o.predict(batch[0], samples=4, generator=generator_of(0)) for o in (plain, fast)]
    torch.testing.assert_close(predicted[1].probabilities, predicted[0].probabilities)


def test_compiled_losses(batch: Batch) -> None:
    loss_fn = torch.compile(losses.cross_entropy, backend="aot_eager")
    model = network()
    optimizer = VOGN(
        model,
        loss_fn,
        data_size=100,
        hess_init=0.5,
        generator=generator_of(2),
        lr=0.01,
        **PLAIN,
    )
    plain = make()
    by_observing(optimizer, *batch)
    by_observing(plain, *batch)
    torch.testing.assert_close(model[0].weight, plain.model[0].weight)
