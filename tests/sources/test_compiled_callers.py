"""What users compile by `torch.compile` may call a source or an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import persample
from persample.errors import UsageError
from persample.losses import cross_entropy
from persample.quantities import Norms
from persample.testing.devices import generator_of


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(function, backend="eager", **options)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3))


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    return torch.randn(6, 4, generator=generator_of(seed)), torch.arange(6) % 3


@pytest.mark.parametrize(
    ("backend", "options"),
    [("fused", {}), ("fused", {"compile": True}), ("hooks", {}), ("vmap", {}), ("vjp", {}), ("loop", {})],
)
def test_a_compiled_function_may_call_a_source(backend: str, options: Any) -> None:
    source = persample.make_source(backend, mlp().eval(), cross_entropy, **options)

    def step(x: Tensor, y: Tensor) -> Any:
        moments = source.moments(x * 2, y)
        squares = [m.mean() for m in moments.second_moment.values()]
        norms = source.compute(x * 2, y, Norms()).norms
        return torch.stack(squares) + 1, norms + source.norms(x, y), source.gram(x, y) * 2

    for seed in range(3):
        for found, expected in zip(compiled(step)(*data(seed)), step(*data(seed)), strict=True):
            torch.testing.assert_close(found, expected)


def trained(step: Callable[[Any, Tensor, Tensor], Any], rule: Any, wrap: Callable[..., Any]) -> Tensor:
    model = mlp()
    optimizer = rule(model, cross_entropy, data_size=60)
    run = wrap(lambda x, y: step(optimizer, x * 2, y) + 1)
    losses = [run(*data(seed)) for seed in range(4)]
    return torch.cat([*[p.detach().flatten() for p in model.parameters()], torch.stack(losses)])


def observing(optimizer: Any, x: Tensor, y: Tensor) -> Any:
    loss = optimizer.observe(x, y)
    optimizer.step()
    return loss


def by_closure(optimizer: Any, x: Tensor, y: Tensor) -> Any:
    def closure() -> Tensor:
        loss = cross_entropy(optimizer.model(x), y).mean()
        loss.backward()
        return loss

    return optimizer.step(closure)


def predicting(optimizer: Any, x: Tensor, y: Tensor) -> Any:
    observing(optimizer, x, y)
    return optimizer.predict(x, samples=3).probabilities[0, 0]


@pytest.mark.parametrize("rule", [persample.VOGN, persample.IVON])
@pytest.mark.parametrize("step", [observing, by_closure, predicting])
def test_a_compiled_function_may_take_a_step(step: Any, rule: Any) -> None:
    assert torch.equal(trained(step, rule, compiled), trained(step, rule, lambda function: function))


def block_of_an_optimizer(x: Tensor, y: Tensor, train: bool = True) -> None:
    optimizer = persample.VOGN(mlp(), cross_entropy, data_size=60)
    run = compiled(lambda x, y: in_block(optimizer.sampled_params(train=train), optimizer.model, x, y))
    run(x, y)


def block_of_a_source(x: Tensor, y: Tensor) -> None:
    source = persample.make_source("fused", mlp(), cross_entropy)
    compiled(lambda x, y: in_block(source.recording(), source.model, x, y))(x, y)


def in_block(block: Any, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with block:
        loss = cross_entropy(model(x * 2), y).mean()
        loss.backward()
    return loss


@pytest.mark.skipif(torch.__version__ < "2.13", reason="an older Dynamo fails at the block before it is begun")
@pytest.mark.parametrize(
    "begin", [block_of_an_optimizer, lambda x, y: block_of_an_optimizer(x, y, train=False), block_of_a_source]
)
def test_a_block_in_a_compiled_function_is_refused(begin: Any) -> None:
    with pytest.raises(UsageError, match=r"torch\.compile"):
        begin(*data())


def test_one_graph_of_it_all_is_refused_with_the_reason() -> None:
    source = persample.make_source("fused", mlp(), cross_entropy)
    with pytest.raises(Exception, match="persample runs model and backward pass itself"):
        compiled(lambda x, y: source.moments(x, y).losses, fullgraph=True)(*data())
