"""Samples in any dimension, folded with others or not, and operands that have an entry for each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import persample
from persample.errors import UnsupportedModelError
from persample.sources.backends.fused.axis import Axis
from persample.sources.backends.fused.disjoint_rows import OwnRows
from persample.sources.backends.fused.layout import Layout

AXES = st.builds(Axis, st.integers(0, 2), st.integers(1, 3), st.integers(1, 3))


def tensor_with(axis: Axis, batch: int) -> Tensor:
    """Numbers 0, 1, 2, … with B samples at `axis` among three dimensions."""
    shape = [2, 2, 2]
    shape[axis.dim] = axis.before * batch * axis.after
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


@given(axis=AXES, batch=st.integers(1, 4))
def test_taking_samples_out_and_putting_them_back(axis: Axis, batch: int) -> None:
    x = tensor_with(axis, batch)
    parts = axis.sample_first(x, batch)
    assert torch.equal(axis.put_back(parts), x)
    layout = Layout(1, batch, 1).at(axis, x.shape)
    sample = torch.arange(x.numel()) // layout.inner % batch
    for i in range(batch):
        assert torch.equal(parts[i].flatten().sort().values, x.flatten()[sample == i])


@given(axis=AXES, batch=st.integers(1, 4), first=st.integers(0, 3), size=st.integers(1, 4))
def test_own_rows_are_zero_elsewhere(axis: Axis, batch: int, first: int, size: int) -> None:
    x = tensor_with(axis, batch) + 1
    whole = OwnRows(axis.sample_first(x, batch), axis, batch)
    rows = slice(min(first, batch - 1), min(first, batch - 1) + size)
    part = whole.take(rows).per_sample()
    assert torch.equal(part, whole.per_sample()[rows])
    assert torch.equal(whole.per_sample().sum(0), x)
    assert torch.equal(whole.per_sample().square().sum(0), x.square())
    assert all(torch.equal(a, b) for a, b in zip(whole.sums(), (x, x.square()), strict=True))
    for i, row in zip(range(batch)[rows], part, strict=True):
        assert torch.equal(axis.sample_first(row, batch)[i], axis.sample_first(x, batch)[i])
        assert row.count_nonzero() == x.numel() / batch


class Net(nn.Module):
    """A linear layer, a table, a matrix and a vector, used by a function."""

    def __init__(self, function: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.table = nn.Embedding(3, 4)
        self.matrix = nn.Parameter(torch.randn(4, 4))
        self.vector = nn.Parameter(torch.randn(4))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.linear(x).tanh())


def of_types(net: Net, h: Tensor) -> Tensor:
    """A table looked up by a constant that has a row for each sample, as BERT does for the type of a token."""
    return h + net.table(torch.zeros(h.shape[:2], dtype=torch.long))


def of_types_time_first(net: Net, h: Tensor) -> Tensor:
    types = torch.arange(h.shape[1]) % 3
    return (h.transpose(0, 1) * net.table(types.unsqueeze(1).expand(-1, len(h)))).transpose(0, 1)


def beside_types(net: Net, h: Tensor) -> Tensor:
    return torch.cat([net.table(torch.ones(len(h), 2, dtype=torch.long)) ** 2, h], 1)


def class_vector(net: Net, h: Tensor) -> Tensor:
    return torch.cat([net.vector.expand(len(h), 1, -1), h], 1)


def for_all_heads(net: Net, h: Tensor) -> Tensor:
    """Heads folded into the samples, multiplied with a matrix for each head, repeated for each sample."""
    heads = h.unflatten(-1, (2, 2)).transpose(1, 2).flatten(0, 1)
    matrices = net.matrix.view(4, 2, 2).transpose(0, 1).repeat(len(h), 1, 1)
    return torch.bmm(heads, matrices.transpose(1, 2)).unflatten(0, (len(h), 2)).flatten(1)


def bias_of_windows(net: Net, h: Tensor) -> Tensor:
    """Attention in windows folded into the samples, with a bias from parameters and a mask for each window."""
    windows = h.unflatten(1, (-1, 2)).flatten(0, 1).unflatten(-1, (2, 2)).transpose(1, 2)
    count = len(windows) // len(h)
    mask = torch.arange(count * 4.0).to(h).view(count, 1, 2, 2).repeat(len(h), 1, 1, 1)
    bias = net.matrix.flatten()[:8].view(1, 2, 2, 2) + mask
    return F.scaled_dot_product_attention(windows, windows, windows, attn_mask=bias).flatten(1).view(len(h), -1)


def learned_queries(net: Net, h: Tensor) -> Tensor:
    """Queries that are parameters look at what each sample shows them: causally, and one of them at nothing."""
    queries = net.matrix.view(1, 2, 4, 2).expand(len(h), -1, -1, -1)
    keys = h.unflatten(-1, (2, 2)).transpose(1, 2)
    causal = F.scaled_dot_product_attention(queries, keys, keys, is_causal=True, scale=0.3)
    shown = torch.arange(4).unsqueeze(1) > torch.arange(4)
    masked = F.scaled_dot_product_attention(queries, keys[:, :1], keys[:, :1], attn_mask=shown, enable_gqa=True)
    return torch.cat([causal, masked], 1)


def letters(net: Net, h: Tensor) -> Tensor:
    """Time-first products by letters, one of them with a constant that was expanded along the samples."""
    t = h.transpose(0, 1)
    q = torch.einsum("ibh,hd->ibd", t, net.matrix)
    k = torch.einsum("ibh,hd->ibd", torch.ones_like(t[:, :1]).expand_as(t), net.matrix)
    p = torch.einsum("ibd,jbd->bij", q, k).softmax(-1)
    mixed = torch.einsum("bij,jbd->ibd", p, t)
    return (mixed @ net.matrix).transpose(0, 1)


def given_back(net: Net, h: Tensor) -> Tensor:
    """Operations that return the parameter that they are given."""
    weight = net.matrix.contiguous().to(h.dtype).view_as(net.matrix)
    return F.linear(h, F.dropout(weight, training=False))


def added_product(net: Net, h: Tensor) -> Tensor:
    return torch.addmm(net.vector, h.flatten(0, 1), net.matrix).view_as(h)


def scaled_added_product(net: Net, h: Tensor) -> Tensor:
    return torch.addmm(net.vector, h[:, 0], net.matrix, beta=2, alpha=0.5)


def as_many_constants_as_samples(net: Net, h: Tensor) -> Tensor:
    """An operand expanded along another dimension, which has as many entries as there are samples."""
    return torch.einsum("btd,nd->bt", h, net.vector.expand(5, -1))


def two_in_one_batch(net: Net, h: Tensor) -> Tensor:
    """Two versions of each sample in one batch, as siamese networks do."""
    first, second = F.linear(torch.cat([h, h.sin()]), net.matrix, net.vector).tanh().chunk(2)
    return first * F.linear(second, net.matrix)


class _Sine(torch.autograd.Function):
    """Computed where PyTorch cannot look."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(np.sin(x.detach().numpy(force=True))).to(x.device)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Tensor:
        return delta * ctx.saved_tensors[0].cos()


def beside_numpy(net: Net, h: Tensor) -> Tensor:
    return torch.addcmul(_Sine.apply(h), h, net.vector)


def change_in_place(net: Net, h: Tensor) -> Tensor:
    weight = net.matrix * 1
    weight[0].mul_(2)
    return h @ weight


FUNCTIONS = [
    of_types,
    of_types_time_first,
    beside_types,
    class_vector,
    for_all_heads,
    bias_of_windows,
    learned_queries,
    letters,
    given_back,
    added_product,
    scaled_added_product,
    as_many_constants_as_samples,
    two_in_one_batch,
    beside_numpy,
    change_in_place,
]


def loss_fn(outputs: Tensor, targets: Any = None) -> Tensor:
    flat = outputs.flatten(1)
    return (flat.sin() * torch.linspace(-1, 1, flat.shape[1], dtype=flat.dtype)).sum(1)


@pytest.mark.parametrize("batch", [1, 2, 4, 5])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_exact(function: Callable[[Net, Tensor], Tensor], batch: int, per_sample_truth: Any) -> None:
    torch.manual_seed(0)
    model, x = Net(function).double(), torch.randn(batch, 4, 4).double()
    truth = per_sample_truth(model, loss_fn, x, None).gradients
    source = persample.make_source("fused", model, loss_fn, check="never")
    torch.testing.assert_close(source.per_sample(x, None), truth, rtol=1e-9, atol=1e-12)
    moments = source.moments(x, None)
    second_moment = {name: g.square().mean(0) for name, g in truth.items()}
    torch.testing.assert_close(
        dict(moments.mean), {name: g.mean(0) for name, g in truth.items()}, rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(dict(moments.second_moment), second_moment, rtol=1e-9, atol=1e-12)


def mixed_by_letters(net: Net, h: Tensor) -> Tensor:
    return torch.einsum("btd,cd->ctd", h, net.matrix[: len(h)])


def behind_numpy(net: Net, h: Tensor) -> Tensor:
    return _Sine.apply(h) @ net.matrix


@pytest.mark.parametrize("function", [mixed_by_letters, behind_numpy])
def test_refused(function: Callable[[Net, Tensor], Tensor]) -> None:
    source = persample.make_source("fused", Net(function), loss_fn, check="never")
    with pytest.raises(UnsupportedModelError):
        source.moments(torch.randn(4, 4, 4), None)
