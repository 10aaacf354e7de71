"""Constants and parameters with an entry for each sample: as exact as others, at a cost that grows as the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from persample import losses, make_source
from persample.errors import UnsupportedModelError

WIDTH, LENGTH = 6, 5


class Net(nn.Module):
    """A model that adds to its samples, `(B, LENGTH, WIDTH)`, what `added` makes of parameters alone."""

    def __init__(self, added: Callable[[Net, int], Tensor]) -> None:
        super().__init__()
        self.table, self.other = nn.Embedding(LENGTH, WIDTH), nn.Embedding(2, WIDTH)
        self.inner, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.norm, self.scale = nn.LayerNorm(WIDTH), nn.Parameter(torch.randn(WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.added = added

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out((x + self.added(self, len(x))).tanh().mean(1))
        return out


def positions(batch: int) -> Tensor:
    return torch.arange(LENGTH).expand(batch, -1)


def token_types(batch: int) -> Tensor:
    return torch.arange(batch * LENGTH).view(batch, LENGTH) % 3 % 2


def steps(model: Net, number: int) -> Tensor:
    return torch.linspace(0, 1, number, dtype=model.scale.dtype)


def table(model: Net, batch: int) -> Tensor:
    found: Tensor = model.table(positions(batch))
    return found


def in_order_of_time(model: Net, batch: int) -> Tensor:
    found: Tensor = model.table(positions(batch).t().contiguous())
    return found.transpose(0, 1)


def written_before(model: Net, batch: int) -> Tensor:
    index = torch.zeros(batch, LENGTH, dtype=torch.long)
    index[:, 2:] = 1
    found: Tensor = model.other(index)
    return found


def written_after(model: Net, batch: int) -> Tensor:
    shifts = steps(model, batch).view(batch, 1, 1)
    found = shifts + model.scale
    shifts.zero_()
    return found


def changed_in_place(model: Net, batch: int) -> Tensor:
    found = model.table(positions(batch)) * 1.0
    found.add_(model.scale)
    return found


def attended(model: Net, batch: int) -> Tensor:
    queries = table(model, batch)
    found: Tensor = model.attention(queries, queries, queries, need_weights=False)[0]
    return found


ADDED: Mapping[str, Callable[[Net, int], Tensor]] = {
    "positions (B, T)": table,
    "positions repeated": lambda m, b: m.table(torch.arange(LENGTH).repeat(b, 1)),
    "positions (T, B)": in_order_of_time,
    "token types": lambda m, b: m.other(token_types(b)),
    "token types, all the same": lambda m, b: m.other(torch.zeros(b, LENGTH, dtype=torch.long)),
    "written before": written_before,
    "written after": written_after,
    "expanded": lambda m, b: m.table.weight.expand(b, -1, -1),
    "expanded twice": lambda m, b: m.scale.expand(LENGTH, -1).expand(b, LENGTH, WIDTH),
    "repeated": lambda m, b: m.table.weight.unsqueeze(0).repeat(b, 1, 1),
    "repeated along two": lambda m, b: m.scale.view(1, 1, WIDTH).repeat(b, LENGTH, 1),
    "expanded and copied": lambda m, b: m.table.weight.expand(b, -1, -1).contiguous().clone(),
    "constant times parameter": lambda m, b: steps(m, b).view(b, 1, 1) * m.scale,
    "linear": lambda m, b: m.inner(steps(m, b * WIDTH).view(b, 1, WIDTH)),
    "product": lambda m, b: steps(m, b * WIDTH).view(b, 1, WIDTH) @ m.inner.weight,
    "several layers": lambda m, b: m.norm(m.inner(table(m, b)).relu() + m.other(token_types(b))),
    "layers of what is expanded": lambda m, b: m.norm(m.inner(m.table.weight.expand(b, -1, -1)).relu()),
    "attention": attended,
    "a part of a split": lambda m, b: torch.cat([m.inner(table(m, b)).chunk(2, -1)[1]] * 2, -1),
    "in place": changed_in_place,
}


class Entries(TorchDispatchMode):
    """Counts the entries of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not result._is_view():
            self.count += result.numel()
        return result


def entries(model: nn.Module, method: str, batch: int) -> int:
    source = make_source("fused", model, losses.cross_entropy, check="never", deterministic=True)
    x, y = torch.randn(batch, LENGTH, WIDTH), torch.arange(batch) % 3
    getattr(source, method)(x, y)
    with Entries() as counted:
        getattr(source, method)(x, y)
    return counted.count


@pytest.mark.parametrize("method", ["per_sample", "moments"])
@pytest.mark.parametrize("name", sorted(set(ADDED) - {"in place", "written after"}))
def test_the_cost_grows_as_the_batch(name: str, method: str) -> None:
    model = Net(ADDED[name])
    assert entries(model, method, 256) < 5 * entries(model, method, 64)


@pytest.mark.parametrize("batch", [1, LENGTH, WIDTH, 7])
@pytest.mark.parametrize("name", ADDED)
def test_exact(name: str, batch: int) -> None:
    model = Net(ADDED[name]).double()
    x, y = torch.randn(batch, LENGTH, WIDTH, dtype=torch.float64), torch.arange(batch) % 3
    with torch.random.fork_rng():
        found = make_source("fused", model, losses.cross_entropy, check="never").per_sample(x, y)
        moments = make_source("fused", model, losses.cross_entropy, check="never").moments(x, y)
    loss = F.cross_entropy(model(x), y, reduction="none")
    for key, p in model.named_parameters():
        rows = [torch.autograd.grad(each, p, retain_graph=True, allow_unused=True)[0] for each in loss]
        expected = torch.stack([torch.zeros_like(p) if row is None else row for row in rows])
        torch.testing.assert_close(found[key], expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(moments.mean[key], expected.mean(0), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(moments.second_moment[key], expected.square().mean(0), rtol=1e-9, atol=1e-12)


def test_what_is_random_keeps_its_numbers() -> None:
    def dropped(model: Net, batch: int) -> Tensor:
        return F.dropout(table(model, batch), 0.5)

    model = Net(dropped).double()
    x, y = torch.randn(7, LENGTH, WIDTH, dtype=torch.float64), torch.arange(7) % 3
    torch.manual_seed(3)
    found = make_source("fused", model, losses.cross_entropy, check="never").per_sample(x, y)
    after = torch.rand(1)
    torch.manual_seed(3)
    loss = F.cross_entropy(model(x), y, reduction="none")
    assert torch.equal(after, torch.rand(1))
    rows = torch.stack([torch.autograd.grad(each, model.table.weight, retain_graph=True)[0] for each in loss])
    torch.testing.assert_close(found["table.weight"], rows)


@pytest.mark.parametrize("made", [table, ADDED["expanded"]])
def test_hooks_on_what_was_made(made: Callable[[Net, int], Tensor]) -> None:
    def hooked(model: Net, batch: int) -> Tensor:
        found = made(model, batch)
        found.register_hook(lambda gradient: 2 * gradient)
        return found

    model = Net(hooked).double()
    x, y = torch.randn(7, LENGTH, WIDTH, dtype=torch.float64), torch.arange(7) % 3
    found = make_source("fused", model, losses.cross_entropy, check="never").per_sample(x, y)
    loss = F.cross_entropy(model(x), y, reduction="none")
    rows = torch.stack([torch.autograd.grad(each, model.table.weight, retain_graph=True)[0] for each in loss])
    torch.testing.assert_close(found["table.weight"], rows)


@pytest.mark.parametrize("made", [table, ADDED["expanded"]])
def test_a_hook_put_on_it_too_late_is_refused(made: Callable[[Net, int], Tensor]) -> None:
    class Late(Net):
        def forward(self, x: Tensor) -> Tensor:
            found = made(self, len(x))
            out: Tensor = self.out((x + found).mean(1))
            found.register_hook(lambda gradient: 2 * gradient)
            return out

    source = make_source("fused", Late(table), losses.cross_entropy, check="never")
    with pytest.raises(UnsupportedModelError, match=r"'table.weight' after it was combined with samples"):
        source.per_sample(torch.randn(7, LENGTH, WIDTH), torch.arange(7) % 3)
