"""The fused backend: exact on what modules cannot show, never B × P numbers, no second weight gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import persample
from persample.checks.memory import allocations
from persample.errors import UnsupportedModelError
from persample.kernels.compiled import without_kernels


def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss whose gradient differs between samples, positions and outputs."""
    flat = outputs.flatten(1)
    weights = torch.linspace(-1, 1, flat.shape[1], dtype=flat.dtype)
    return (flat.square() * weights).sum(1) + flat.sin().sum(1) * (1 + targets)


def assert_exact(model: nn.Module, inputs: Tensor, **options: object) -> None:
    """Compare moments and rows with one backward pass for each sample, in float64."""
    model = model.double()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    targets = torch.arange(len(inputs)) % 3
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = {name: [] for name in parameters}
    for i in range(len(inputs)):
        loss = loss_fn(model(inputs[i : i + 1]), targets[i : i + 1])[0]
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for (name, p), g in zip(parameters.items(), gradients, strict=True):
            rows[name].append(torch.zeros_like(p) if g is None else g)
    source = persample.make_source("fused", model, loss_fn, check="never", **options)
    moments, found = source.moments(inputs, targets), source.per_sample(inputs, targets)
    assert list(moments.mean) == list(found) == list(parameters)
    scale = max(torch.stack(row).abs().max().item() for row in rows.values())
    for name, row in rows.items():
        g = torch.stack(row)
        for value, expected in ((found[name], g), (moments.mean[name], g.mean(0))):
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12 * scale)
        torch.testing.assert_close(moments.second_moment[name], g.square().mean(0), rtol=1e-9, atol=1e-12 * scale**2)


class Tokens(nn.Module):
    """Class token, positions, a scale and, if wanted, a head tied to the embedding."""

    def __init__(self, tied: bool, batch_first: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.position = nn.Parameter(torch.randn(1, 7, 8))
        self.class_token = nn.Parameter(torch.randn(1, 1, 8))
        self.scale = nn.Parameter(torch.randn(8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        self.tied, self.batch_first = tied, batch_first
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.cat([self.class_token.expand(len(tokens), -1, -1), self.embedding(tokens)], 1) + self.position
        if not self.batch_first:
            x = x.transpose(0, 1)
        x = self.layer(x) * self.scale
        if not self.batch_first:
            x = x.transpose(0, 1)
        return F.linear(x, self.embedding.weight) if self.tied else self.head(x[:, 0])


class LowRank(nn.Module):
    """A frozen weight with a low-rank update and a mask, and a product with a bare matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4), requires_grad=False)
        self.a = nn.Parameter(torch.randn(2, 4))
        self.b = nn.Parameter(torch.randn(3, 2))
        self.register_buffer("mask", torch.rand(3, 4))
        self.position = nn.Embedding(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position(torch.arange(x.shape[1]))
        return F.linear(x, (self.weight + self.b @ self.a) * self.mask) @ self.b


class Frames(nn.Module):
    """Convolution and norm on frames that are folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 3, 3, padding="same")
        self.norm = nn.GroupNorm(1, 3)
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        batch, time = x.shape[:2]
        h = self.norm(self.convolution(x.flatten(0, 1))).mean((2, 3))
        return self.linear(h.view(batch, time, -1))


class Functional(nn.Module):
    """Modules used by their weights and methods alone, and one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(F.linear(x, self.first.weight.t()), inplace=True)
        return self.second.forward(self.first(h) + F.linear(h, self.first.weight[:, [0, 1, 2, 3]]))


class Checkpointed(nn.Module):
    """Non-reentrant activation checkpointing around an in-place activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        def block(h: Tensor) -> Tensor:
            return self.second(F.relu(self.norm(self.first(h)), inplace=True))

        return checkpoint(block, self.first(x), use_reentrant=False)


class GroupNorms(nn.Module):
    """Group norms whose gradients, and whose scales, lie in memory with gaps or as one number for many."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.GroupNorm(1, channels), nn.GroupNorm(1, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return torch.cat([h, self.second(h)], dim=2).flatten(1) + self.second(h).sum((1, 2), keepdim=True).flatten(1)


TOKENS = torch.arange(30).reshape(5, 6) * 7 % 11
CASES = {
    "class token, position, scale": (lambda: Tokens(tied=False), TOKENS),
    "head tied to the embedding": (lambda: Tokens(tied=True), TOKENS),
    "time first": (lambda: Tokens(tied=False, batch_first=False), TOKENS),
    "as many positions as samples": (lambda: Tokens(tied=True, batch_first=False), torch.arange(42).reshape(7, 6) % 11),
    "batch of one": (lambda: Tokens(tied=True), TOKENS[:1]),
    "low rank": (LowRank, torch.randn(5, 6, 4)),
    "folded frames": (Frames, torch.randn(4, 3, 2, 5, 5)),
    "functional calls": (Functional, torch.randn(5, 4)),
    "checkpointing": (Checkpointed, torch.randn(5, 3, 4)),
    "group norms of one channel": (lambda: GroupNorms(1), torch.randn(5, 1, 3)),
    "group norms of two channels": (lambda: GroupNorms(2), torch.randn(5, 2, 3)),
    "weight norm": (lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), torch.randn(5, 4)),
    "an operation without a rule": (lambda: nn.Sequential(nn.Linear(4, 3), nn.PReLU(3)), torch.randn(5, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_exact_where_modules_do_not_show_the_use(name: str) -> None:
    torch.manual_seed(0)
    build, inputs = CASES[name]
    assert_exact(build(), inputs)


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="this PyTorch has no LinearCrossEntropyLoss")
@pytest.mark.parametrize("chunks", [False, True])
def test_linear_layer_and_cross_entropy_at_once(chunks: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            options = nn.LinearCrossEntropyOptions() if chunks else None
            self.hidden = nn.Linear(3, 4)
            self.loss = nn.LinearCrossEntropyLoss(4, 2, bias=True, reduction="none", options=options)

        def forward(self, x: Tensor) -> Tensor:
            return self.loss(self.hidden(x), (x[:, 0] > 0).long()).unsqueeze(1)

    torch.manual_seed(0)
    assert_exact(Model(), torch.randn(5, 3))


@pytest.mark.parametrize("batch", [1, 3, 15, 16, 17, 64, 65])
@pytest.mark.parametrize("deterministic", [False, True])
def test_convolutions_on_both_sides_of_every_chunk(batch: int, deterministic: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.ReLU(True), nn.Conv2d(4, 6, 3, groups=2, dilation=2)
    )
    assert_exact(model, torch.randn(batch, 2, 12, 11), deterministic=deterministic)


def test_several_uses_on_both_sides_of_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for rows in (1, 3, len(TOKENS) - 1, len(TOKENS), 1000):
        monkeypatch.setattr("persample.sources.backends.fused.accumulators.samples_at_once", lambda *_, rows=rows: rows)
        assert_exact(Tokens(tied=True), TOKENS)


def test_an_unseen_use_is_refused_by_name() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            with torch._C.DisableTorchFunction():  # as a kernel outside of PyTorch
                return x * weight

        @staticmethod
        def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, ...]:
            x, weight = ctx.saved_tensors
            return delta * weight, (delta * x).sum(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return Double.apply(x * self.hidden, self.hidden)

    source = persample.make_source("fused", Model(), loss_fn)
    with pytest.raises(UnsupportedModelError, match="'hidden'"):
        source.moments(torch.randn(4, 3), torch.zeros(4))


def test_an_input_changed_in_place_is_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            h = self.linear(x)
            x.mul_(2)
            return h + x

    source = persample.make_source("fused", Model(), loss_fn)
    with pytest.raises(UnsupportedModelError, match="in place"):
        source.moments(torch.randn(4, 3), torch.zeros(4))


def test_results_repeat_bit_for_bit_when_deterministic() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 36, 3))
    inputs, targets = torch.randn(20, 1, 8, 8), torch.zeros(20)
    first, second = (
        persample.make_source("fused", model, loss_fn, deterministic=True).moments(inputs, targets) for _ in range(2)
    )
    for name, value in first.second_moment.items():
        assert torch.equal(value, second.second_moment[name])
        assert torch.equal(first.mean[name], second.mean[name])


def test_bfloat16_autocast_agrees_with_float32() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 36, 3))
    inputs, targets = torch.randn(20, 1, 8, 8), torch.zeros(20)
    source = persample.make_source("fused", model, loss_fn)
    expected = source.moments(inputs, targets)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        found = source.moments(inputs, targets)
    for name, value in expected.second_moment.items():
        assert found.second_moment[name].dtype == torch.float32
        torch.testing.assert_close(found.second_moment[name], value, rtol=0.1, atol=0.02 * value.max().item())


def test_frozen_parameters_cost_nothing_and_have_no_entry() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    moments = persample.make_source("fused", model, loss_fn).moments(torch.randn(5, 3), torch.zeros(5))
    assert list(moments.mean) == ["1.weight", "1.bias"]


def test_never_as_much_memory_as_per_sample_gradients() -> None:
    batch = 64
    model = nn.Sequential(nn.Conv2d(8, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 256))
    inputs, targets = torch.randn(batch, 8, 10, 10), torch.zeros(batch)
    source = persample.make_source("fused", model, loss_fn, check="never", deterministic=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        source.moments(inputs, targets)
    largest_layer = max(p.numel() for p in model.parameters()) * 4
    assert max(allocations(profiler)) < batch * largest_layer / 4


def test_a_weight_gradient_is_not_computed_twice() -> None:
    model = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 10))
    source = persample.make_source("fused", model, loss_fn, check="never", deterministic=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler, without_kernels():
        source.moments(torch.randn(8, 30), torch.zeros(8))
    products = sum(e.count for e in profiler.key_averages() if e.key in ("aten::mm", "aten::addmm", "aten::bmm"))
    # Two forward, one to the input of the second layer, and for each weight δᵀa and (δ²)ᵀ(a²).
    assert products == 2 + 1 + 2 * 2


def test_a_batch_that_reaches_no_parameter_has_zeros() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return x

    moments = persample.make_source("fused", Model(), loss_fn).moments(torch.randn(4, 3), torch.zeros(4))
    assert all(not value.any() for value in (*moments.mean.values(), *moments.second_moment.values()))
