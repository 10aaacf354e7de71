"""Models that are recorded although where entries go is found out by trial, or depends on constants."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import persample
from persample.sources.backends.fused.known_values import WithKnownValues, all_different
from persample.testing.zoo.case import Net, tie

BATCH, LENGTH, WIDTH, WORDS = 5, 6, 4, 7


def of_cells(cell: Callable[..., nn.Module], state: Callable[[Tensor], Any], shown: Callable[[Any], Tensor]) -> Net:
    def forward(m: Any, x: Tensor) -> Tensor:
        embedded, h = m.embedding(x), state(x)
        for t in range(LENGTH):
            h = m.cell(embedded[:, t], h)
        return m.last(shown(h))  # type: ignore[no-any-return]

    return Net(forward, embedding=nn.Embedding(WORDS, 3), cell=cell(3, WIDTH), last=nn.Linear(WIDTH, 3))


def zeros(x: Tensor) -> Tensor:
    return torch.zeros(len(x), WIDTH, dtype=torch.float64, device=x.device)


def own_recurrence() -> Net:
    def forward(m: Any, x: Tensor) -> Tensor:
        embedded, h = m.embedding(x), zeros(x)
        for t in range(LENGTH):
            h = torch.tanh(m.inner(embedded[:, t]) + m.outer(h))
        return m.last(h)  # type: ignore[no-any-return]

    inner, outer = nn.Linear(3, WIDTH), nn.Linear(WIDTH, WIDTH)
    return Net(forward, embedding=nn.Embedding(WORDS, 3), inner=inner, outer=outer, last=nn.Linear(WIDTH, 3))


def attention(parts: Callable[[Tensor], Any], positions: Callable[[Any, Tensor], Tensor], tied: bool = False) -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        z = m.embedding(x) + m.positions(positions(m, x))
        q, k, v = parts(m.qkv(m.norm(z)).view(len(x), LENGTH, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4))
        z = z + (torch.softmax(q @ k.mT, -1) @ v).transpose(1, 2).flatten(2)
        return m.head(z).mean(1)  # type: ignore[no-any-return]

    layers = {"embedding": nn.Embedding(WORDS, WIDTH), "positions": nn.Embedding(LENGTH + 2, WIDTH)}
    qkv, head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
    model = Net(forward, **layers, norm=nn.LayerNorm(WIDTH), qkv=qkv, head=head)
    return tie(model, **{"head.weight": "embedding.weight"}) if tied else model


def arange(m: Any, x: Tensor) -> Tensor:
    return torch.arange(LENGTH, device=x.device)


def shifted(m: Any, x: Tensor) -> Tensor:
    return (torch.arange(LENGTH, device=x.device) + 2).unsqueeze(0)


def doubled(m: Any, x: Tensor) -> Tensor:
    return (torch.arange(LENGTH // 2, device=x.device).unsqueeze(1).expand(-1, 2)).reshape(-1)


def written(m: Any, x: Tensor) -> Tensor:
    positions = torch.arange(LENGTH, device=x.device)
    positions[0] = 1
    return positions


def of_numbers(m: Any, x: Tensor) -> Tensor:
    return torch.arange(LENGTH, device=x.device) * m.step


def of_a_buffer(m: Any, x: Tensor) -> Tensor:
    return m.places[:, 1 : 1 + x.shape[1]]  # type: ignore[no-any-return]


def gathered(m: Any, x: Tensor) -> Tensor:
    """As BERT looks up the kinds of tokens: one row of zeros, at the positions, for each sample."""
    kinds = torch.gather(m.kinds, 1, of_a_buffer(m, x))
    return kinds.expand(len(x), -1)


def buffered(positions: Callable[[Any, Tensor], Tensor]) -> Any:
    model = attention(lambda t: t.unbind(0), positions)
    model.register_buffer("places", torch.arange(LENGTH + 2).unsqueeze(0))
    model.register_buffer("kinds", torch.zeros(1, LENGTH + 2, dtype=torch.long))
    return model


def masked() -> Net:
    """Neither `&` nor writing into something else writes into positions."""

    def forward(m: Any, x: Tensor) -> Tensor:
        positions = torch.arange(LENGTH, device=x.device)
        weights = torch.ones(LENGTH, dtype=torch.float64, device=x.device)
        weights[0] = 2.0
        z = m.embedding(x) + m.positions(positions)
        z = z.masked_fill(((positions > 1) & (positions < 4)).unsqueeze(-1), 0.0)
        return m.last((z * weights.unsqueeze(-1)).sum(1))  # type: ignore[no-any-return]

    layers = {"embedding": nn.Embedding(WORDS, WIDTH), "positions": nn.Embedding(LENGTH, WIDTH)}
    return Net(forward, **layers, last=nn.Linear(WIDTH, 3))


def relative() -> Net:
    """As T5: distances in buckets, of which a table has fewer rows than are looked up."""

    def forward(m: Any, x: Tensor) -> Tensor:
        positions = torch.arange(LENGTH, device=x.device)
        distances = (positions.unsqueeze(0) - positions.unsqueeze(1)).abs().clamp(max=3)
        z = m.embedding(x)
        weights = torch.softmax(z @ z.mT + m.bias(distances).squeeze(-1), -1)
        return m.last((weights @ z).mean(1))  # type: ignore[no-any-return]

    layers = {"embedding": nn.Embedding(WORDS, WIDTH), "bias": nn.Embedding(4, 1)}
    return Net(forward, **layers, last=nn.Linear(WIDTH, 3))


def heads_beside_the_samples() -> Net:
    """Queries and a table of places, with samples and heads in one dimension, as for `torch.bmm`."""

    def forward(m: Any, x: Tensor) -> Tensor:
        rows = m.embedding(x).view(len(x), LENGTH, 2, 3).transpose(1, 2).reshape(2 * len(x), LENGTH, 3)
        weights = torch.bmm(rows, m.places.repeat(len(x), 1, 1).mT).softmax(-1)
        return m.last(torch.bmm(weights, rows).view(len(x), -1, 3).sum(1))  # type: ignore[no-any-return]

    places = nn.Parameter(torch.randn(2, LENGTH, 3))
    return Net(forward, embedding=nn.Embedding(WORDS, 6), last=nn.Linear(3, 3), places=places)


def without_a_rule() -> Net:
    """As XLNet: an einsum of samples and a parameter, which is mapped over the samples."""

    def forward(m: Any, x: Tensor) -> Tensor:
        z = torch.einsum("ibh,hnd->ibnd", m.embedding(x).transpose(0, 1), m.heads)
        return m.last(torch.tanh(torch.einsum("ibnd,nd->bi", z, m.query)))  # type: ignore[no-any-return]

    heads, query = nn.Parameter(torch.randn(WIDTH, 2, 3)), nn.Parameter(torch.randn(2, 3))
    return Net(forward, embedding=nn.Embedding(WORDS, WIDTH), heads=heads, query=query, last=nn.Linear(LENGTH, 3))


MODELS: dict[str, Callable[[], Any]] = {
    "GRU cells": lambda: of_cells(nn.GRUCell, zeros, lambda h: h),
    "GRU cells without a first state": lambda: of_cells(nn.GRUCell, lambda x: None, lambda h: h),
    "LSTM cells": lambda: of_cells(nn.LSTMCell, lambda x: (zeros(x), zeros(x)), lambda h: h[0]),
    "an own recurrence": own_recurrence,
    "unpacked heads": lambda: attention(lambda t: t, arange),
    "heads taken one by one": lambda: attention(lambda t: (t[0], t[1], t[2]), arange),
    "later positions": lambda: attention(lambda t: t.unbind(0), shifted),
    "positions in pairs": lambda: attention(lambda t: t.unbind(0), doubled),
    "positions of a buffer": lambda: buffered(of_a_buffer),
    "kinds of a buffer": lambda: buffered(gathered),
    "positions beside a mask": masked,
    "relative positions": relative,
    "an operation without a rule": without_a_rule,
    "heads beside the samples": heads_beside_the_samples,
    "a tied head": lambda: attention(lambda t: t, arange, tied=True),
}


def truth(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean gradient and second moment by one backward pass for each sample."""
    rows = []
    for i in range(len(x)):
        loss = persample.losses.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).sum()
        rows.append(torch.autograd.grad(loss, list(model.parameters())))
    stacked = [torch.stack(g) for g in zip(*rows, strict=True)]
    names = [name for name, _ in model.named_parameters()]
    return {n: (g.mean(0), g.square().mean(0)) for n, g in zip(names, stacked, strict=True)}


def require_exact(model: Any, source: Any, call: int) -> None:
    generator = torch.Generator().manual_seed(call)
    x = torch.randint(WORDS, (BATCH, LENGTH), generator=generator)
    y = torch.randint(3, (BATCH,), generator=generator)
    expected, found = truth(copy.deepcopy(model), x, y), source.moments(x, y)
    for name, (mean, second_moment) in expected.items():
        torch.testing.assert_close(found.mean[name], mean, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.second_moment[name], second_moment, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_it_is_recorded_and_exact(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().double()
    source: Any = persample.make_source("fused", model, persample.losses.cross_entropy, compile=True)
    for call in range(4):
        require_exact(model, source, call)
        assert source.ran == "replayed", source.ran_because
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
    assert not capfd.readouterr().err


def test_positions_that_are_written_into_are_no_constants() -> None:
    torch.manual_seed(0)
    model = attention(lambda t: t.unbind(0), written).double()
    source: Any = persample.make_source("fused", model, persample.losses.cross_entropy, compile=True)
    for call in range(3):
        require_exact(model, source, call)
    assert source.ran == "eager"


@pytest.mark.parametrize("changed", [1, torch.tensor([0, 3, 2, 1, 4, 5, 6, 7])])
def test_positions_of_a_buffer_that_changes(changed: Any) -> None:
    """Recorded with positions that are all different, and looked at in each call; their order matters not less."""
    torch.manual_seed(0)
    model = buffered(of_a_buffer).double()
    source: Any = persample.make_source("fused", model, persample.losses.cross_entropy, compile=True)
    before, ran = model.places.clone(), []
    for call in range(6):
        model.places.copy_(before)
        if call in (2, 3):
            model.places[:] = changed
        require_exact(model, source, call)
        ran.append(source.ran)
    assert ran == ["replayed", "replayed", "eager", "eager", "replayed", "replayed"]


def test_positions_of_a_buffer_that_the_model_writes_into() -> None:
    def counted(m: Any, x: Tensor) -> Tensor:
        m.places[:, 2] = m.places[:, 3]
        return of_a_buffer(m, x)

    torch.manual_seed(0)
    model = buffered(counted).double()
    source: Any = persample.make_source("fused", model, persample.losses.cross_entropy, compile=True)
    for call in range(3):
        require_exact(model, source, call)
    assert source.ran == "eager"


def test_positions_of_two_buffers_in_the_same_memory() -> None:
    def turned(m: Any, x: Tensor) -> Tensor:
        m.same[:, 1] = 5
        return of_a_buffer(m, x)

    torch.manual_seed(0)
    model = buffered(turned).double()
    model.register_buffer("same", model.places.view(1, -1)[:, :])
    source: Any = persample.make_source("fused", model, persample.losses.cross_entropy, compile=True)
    for call in range(3):
        require_exact(model, source, call)
        model.places[:, 1] = 1


def test_positions_made_of_a_number_that_changes() -> None:
    torch.manual_seed(0)
    model = attention(lambda t: t.unbind(0), of_numbers).double()
    source: Any = persample.make_source("fused", model, persample.losses.cross_entropy, compile=True)
    for call, step in enumerate((1, 1, 0, 0, 1, 0)):
        model.step = step
        require_exact(model, source, call)


def test_entries_are_told_apart_by_their_values() -> None:
    assert all_different(torch.tensor([3, 1, 2]))
    assert not all_different(torch.tensor([3, 1, 3]))


def test_constants_have_values_where_a_graph_runs_on_tensors_without_any() -> None:
    from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    once = graph.call_function(torch.arange, (4,))
    twice = graph.call_method("expand", (graph.call_method("unsqueeze", (once, 0)), 2, -1))
    graph.output((once, twice, graph.call_function(torch.add, (once, x))))
    with FakeTensorMode() as mode:
        run = WithKnownValues(torch.fx.GraphModule(nn.Module(), graph)).run
        one, two, unknown = run(mode.from_tensor(torch.arange(4)))
        assert all_different(one)
        assert not all_different(two)
        with pytest.raises(DynamicOutputShapeException):
            assert all_different(unknown)
