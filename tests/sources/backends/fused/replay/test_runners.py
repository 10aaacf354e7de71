"""The ways to run a recorded step; CUDA graphs only where the tests run on a GPU (`PERSAMPLE_TEST_DEVICE=cuda`)."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import persample
from persample.errors import OptionError
from persample.sources.backends.fused.replay import runners
from persample.sources.backends.fused.replay.runners import _written
from persample.testing.devices import on_cuda, set_seed
from persample.testing.zoo.case import Net

needs_gpu = pytest.mark.skipif(not on_cuda(), reason="needs a GPU (PERSAMPLE_TEST_DEVICE=cuda)")


def model_of(middle: Callable[[Any, Tensor], Tensor] = lambda m, h: torch.tanh(h), **parts: Any) -> nn.Module:
    torch.manual_seed(0)
    parts |= {"first": nn.Linear(4, 5), "last": nn.Linear(5, 3)}
    return Net(lambda m, x: m.last(middle(m, m.first(x))), **parts).double()


def batch(size: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    set_seed(seed)
    return torch.randn(size, 4, dtype=torch.float64), torch.randint(3, (size,))


def source_of(model: nn.Module, compile: Any = "cuda-graph") -> persample.PerSampleGradSource:
    return persample.make_source("fused", model, persample.losses.cross_entropy, compile=compile)


def require_right(found: persample.Moments, model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Compare with one backward pass for each sample."""
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for one, target in zip(x, y, strict=True):
        loss = F.cross_entropy(model(one[None]), target[None])
        for name, g in zip(rows, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            rows[name].append(g)
    for name, row in rows.items():
        g = torch.stack(row)
        torch.testing.assert_close(found.mean[name], g.mean(0), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found.second_moment[name], g.square().mean(0), rtol=1e-9, atol=1e-11)


def require_same(found: persample.Moments, expected: persample.Moments) -> None:
    torch.testing.assert_close(found.losses, expected.losses)
    for name in expected.mean:
        torch.testing.assert_close(found.mean[name], expected.mean[name])
        torch.testing.assert_close(found.second_moment[name], expected.second_moment[name])


def test_another_value_of_the_option_is_refused() -> None:
    for value in ("cudagraph", None, 1, [True]):
        with pytest.raises(OptionError, match="compile="):
            source_of(model_of(), value)


def test_operands_that_are_written_into_are_known_through_their_views() -> None:
    def step(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        a[0].add_(1)
        c.view(-1).narrow(0, 0, 1).copy_(b[:1])
        d = b * 2
        d.add_(1)
        return d

    recorded = make_fx(step)(torch.ones(3), torch.ones(3), torch.ones(3))
    assert _written(recorded) == {0, 2}


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor_makes_kernels_of_the_step(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(lambda m, h: F.dropout(torch.tanh(h), 0.2))
    source, expected = source_of(model, "inductor"), source_of(model, False)
    for seed in range(3):
        x, y = batch(seed=seed)
        set_seed(seed)
        found = source.moments(x, y)
        set_seed(seed)
        require_same(found, expected.moments(x, y))
    assert source.ran == "inductor", source.ran_because


def test_inductor_is_not_given_thousands_of_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "_MOST_FOR_INDUCTOR", 5)
    source, model = source_of(model := model_of(), "inductor"), model
    for seed in range(3):
        require_right(source.moments(*batch(seed=seed)), model, *batch(seed=seed))
    assert source.ran == "replayed"
    assert "minutes" in source.ran_because


@pytest.mark.skipif(on_cuda(), reason="an index out of bounds ends the process there")
def test_an_error_is_that_of_the_ordinary_way_and_the_next_batch_is_replayed() -> None:
    source, model = source_of(model := model_of(), True), model
    x, y = batch()
    source.moments(x, y)
    for _ in range(2):
        with pytest.raises(IndexError):
            source.moments(x, y + 7)
        require_right(source.moments(x, y), model, x, y)
        assert source.ran == "replayed"


@pytest.mark.skipif(on_cuda(), reason="there is a GPU")
def test_without_a_gpu_a_cuda_graph_is_left_and_the_step_replayed(caplog: pytest.LogCaptureFixture) -> None:
    source, model = source_of(model := model_of()), model
    for seed in range(3):
        require_right(source.moments(*batch(seed=seed)), model, *batch(seed=seed))
    assert source.ran == "replayed"
    assert "GPU" in source.ran_because
    said = [record.getMessage() for record in caplog.records if record.name.startswith("persample")]
    assert len(said) == 1
    assert "by cuda-graph" in said[0]


@needs_gpu
def test_a_cuda_graph_follows_other_numbers_sizes_and_memory() -> None:
    model = model_of()
    source = source_of(model)
    kept = []
    for step in range(8):
        size = 6 if step % 3 else 4
        x, y = batch(size, seed=step)
        found = source.moments(x, y)
        require_right(found, model, x, y)
        assert source.ran == "cuda-graph"
        kept.append((found, x, y))
        with torch.no_grad():
            for p in model.parameters():
                if step == 4:
                    p.data = p.data.clone()  # in other memory from now on
    for found, x, y in kept:  # no call has written into the results of another
        require_right(found, model, x, y)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    for step in range(3):
        x, y = batch(seed=step)
        require_right(source.moments(x, y), model, x, y)


@needs_gpu
def test_a_cuda_graph_draws_the_numbers_of_an_ordinary_pass() -> None:
    def dropping(m: Any, h: Tensor) -> Tensor:
        return F.dropout(torch.tanh(h), 0.5) + 0.1 * torch.randn_like(h)

    found, after = [], []
    for compile in (False, "cuda-graph"):
        source = source_of(model_of(dropping), compile)
        batches = [batch(seed=n) for n in range(5)]
        set_seed(7)
        found.append([source.moments(*one) for one in batches])
        after.append(torch.rand(3))
    assert source.ran == "cuda-graph"
    for expected, replayed in zip(*found, strict=True):
        require_same(replayed, expected)
    assert torch.equal(*after)
    x, y = batch()
    assert not torch.equal(source.moments(x, y).losses, source.moments(x, y).losses)


@needs_gpu
def test_a_cuda_graph_leaves_the_state_that_the_forward_pass_leaves() -> None:
    def counting(m: Any, h: Tensor) -> Tensor:
        m.calls.add_(1)
        return torch.tanh(h) * m.calls

    model = model_of(counting, calls=torch.zeros((), dtype=torch.float64))
    ordinary = copy.deepcopy(model)
    source, expected = source_of(model), source_of(ordinary, False)
    for step in range(5):
        x, y = batch(seed=step)
        require_same(source.moments(x, y), expected.moments(x, y))
        assert model.calls == step + 1
    assert source.ran == "cuda-graph"


@needs_gpu
def test_convolutions_norms_and_tied_embeddings_run_in_a_cuda_graph() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer = nn.Embedding(9, 8), nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(self.layer(self.table(ids)).mean(1), self.table.weight)

    images = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 9)
    )
    for model, x in ((images, torch.randn(5, 3, 8, 8)), (Tied(), torch.randint(9, (5, 7)))):
        y = torch.randint(9, (5,))
        source, expected = source_of(model), source_of(model, False)
        for step in range(4):
            set_seed(step)
            found = source.moments(x, y)
            set_seed(step)
            require_same(found, expected.moments(x, y))
            x, y = x.roll(1, 0), (y + 1) % 9
        assert source.ran == "cuda-graph", source.ran_because


@needs_gpu
def test_a_step_that_is_partly_on_the_cpu_is_replayed_without_a_cuda_graph() -> None:
    model = model_of(lambda m, h: torch.tanh(h) * torch.full((), 2.0, device="cpu"))
    source = source_of(model)
    for seed in range(3):
        require_right(source.moments(*batch(seed=seed)), model, *batch(seed=seed))
    assert source.ran in ("replayed", "cuda-graph")


@needs_gpu
def test_an_optimizer_trains_with_cuda_graphs_as_without() -> None:
    weights = []
    for compile in (False, "cuda-graph"):
        model = model_of(lambda m, h: F.dropout(torch.tanh(h), 0.2))
        optimizer = persample.VOGN(model, persample.losses.cross_entropy, data_size=60, backend="fused",
                                   backend_options={"compile": compile}, mc_samples=2)  # fmt: skip
        set_seed(3)
        for x, y in [batch(seed=n) for n in range(6)]:
            set_seed(int(x.sum().abs() * 1000))
            optimizer.observe(x, y)
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert optimizer.source.ran == "cuda-graph"
    torch.testing.assert_close(*weights)


@needs_gpu
def test_inside_a_cuda_graph_of_the_user_the_step_goes_the_ordinary_way() -> None:
    model = model_of()
    source = persample.make_source("fused", model, persample.losses.cross_entropy, compile="cuda-graph", check="never")
    x, y = batch()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            source.moments(x, y)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = source.moments(x, y)
    assert "captured" in source.ran_because
    new = batch(seed=9)
    x.copy_(new[0]), y.copy_(new[1])
    graph.replay()
    require_right(found, model, x, y)
