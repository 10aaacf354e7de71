"""Hypothesis strategies for layers and uses of parameters that backends with rules for layers may refuse."""

from __future__ import annotations

import string
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from persample.testing.drawn.functions import Around, Function
from persample.testing.drawn.layers import Draw, Shape
from persample.testing.zoo.calls import ScaledLinear
from persample.testing.zoo.normalization import with_statistics

Options = dict[str, Callable[[], nn.Module]]


@st.composite
def operations(draw: Draw, shape: Shape) -> nn.Module:
    """Any of this file, for an input of the given shape (of one sample, without dim B)."""
    options = _of_parameters(draw, shape) | _of_layers(draw, shape) | _without_parameters(draw, shape)
    if len(shape) == 2:
        options |= _of_sequences(draw, shape)
    return options[draw(st.sampled_from(sorted(options)))]()


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def _of_parameters(draw: Draw, shape: Shape) -> Options:
    """Bare parameters, and those of layers used by functional calls."""
    width = shape[-1]
    part = shape[draw(st.integers(0, len(shape) - 1)) :]
    names = string.ascii_lowercase[1 : 2 + len(shape)]
    options: dict[str, tuple[Callable[..., Tensor], nn.Module | nn.Parameter]] = {
        "x * p": (lambda p, x: x * p, _parameter(*part)),
        "p + x": (lambda p, x: p + x, _parameter(1, *shape)),
        "x - p": (lambda p, x: x - p, _parameter(*part)),
        "x / (1 + p²)": (lambda p, x: x / (1 + p.square()), _parameter(width)),
        "p as a scalar": (lambda p, x: x * p, _parameter()),
        "x @ p": (lambda p, x: x @ p, _parameter(width, 3)),
        "einsum": (lambda p, x: torch.einsum(f"{names},{names[1:]}z->bz", x, p), _parameter(*shape, 2)),
        "F.linear of a slice": (lambda p, x: F.linear(x, p[1:]), _parameter(4, width)),
        "low rank": (lambda p, x: F.linear(x, p @ p.mT), _parameter(width, 2)),
        "tied to its transpose": (
            lambda m, x: F.linear(F.linear(x, m.weight, m.bias).tanh(), m.weight.t()),
            nn.Linear(width, 2),
        ),
        "addmm of flat positions": (
            lambda m, x: torch.addmm(m.bias, x.reshape(-1, width), m.weight.t()).view(*x.shape[:-1], 2),
            nn.Linear(width, 2),
        ),
        "cat with p": (
            lambda p, x: torch.cat([p.expand(len(x), *p.shape[1:]), x], dim=-1),
            _parameter(1, *shape[:-1], 2),
        ),
        "where": (lambda p, x: torch.where(x > 0, x * p, p), _parameter(width)),
        "in place": (lambda p, x: x.sin().mul_(p).add_(p), _parameter(width)),
        "members in the batch": (
            lambda p, x: (x.repeat(2, *[1] * len(shape)).unflatten(0, (2, -1)) * p).sum(0),
            _parameter(2, *[1] * (1 + len(shape))),
        ),
        "each sample by itself": (lambda p, x: torch.stack([(sample * p).tanh() for sample in x]), _parameter(width)),
        "masked entries": (lambda p, x: torch.zeros_like(x).masked_scatter(x > 0, x[x > 0] * p), _parameter()),
        "nearest row": (lambda p, x: p[(x.unsqueeze(-1) - p[:, 0]).abs().argmin(-1)], _parameter(4, 2)),
        "Fourier": (
            lambda p, x: torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(p), n=width),
            _parameter(width // 2 + 1, 2),
        ),
        "p stands for masked positions": (lambda p, x: torch.where((x > 0)[..., :1], p, x), _parameter(width)),
    }
    if len(shape) >= 2:
        options |= {
            "p @ x": (lambda p, x: p @ x, _parameter(2, shape[-2])),
            "softmax of scores": (lambda p, x: (x @ p).softmax(-1).unsqueeze(-1) * x, _parameter(width)),
            "rows between": (
                lambda p, x: torch.cat([x, p.expand(len(x), -1, *x.shape[2:])], dim=1),
                _parameter(2, *shape[1:]),
            ),
            "scale of channels": (lambda p, x: x * p.view(-1, *[1] * (len(shape) - 1)), _parameter(shape[0])),
        }
    return {name: partial(Around, name, *how) for name, how in options.items()}


def _of_layers(draw: Draw, shape: Shape) -> Options:
    """Layers that only some backends know, and unusual ways to use one."""
    width = shape[-1]
    flat = torch.Size(shape).numel()
    ways: dict[str, tuple[Callable[..., Tensor], Callable[[], nn.Module]]] = {
        "called by its method": (lambda m, x: m.forward(x), lambda: nn.Linear(width, 2)),
        "called by keyword": (lambda m, x: m(input=x), lambda: nn.Linear(width, 2)),
        "features first": (lambda m, x: (m.weight @ x.flatten(1).t()).t(), lambda: nn.Linear(flat, 2)),
        "checkpoint": (
            lambda m, x: checkpoint(m, x, use_reentrant=False),
            lambda: nn.Sequential(nn.Linear(width, 3), nn.Tanh(), nn.Linear(3, 2)),
        ),
        "on the pieces": (
            lambda m, x: torch.stack([m(piece.unsqueeze(-1)) for piece in x.unbind(-1)], -1),
            lambda: nn.Linear(1, 2),
        ),
        "written into zeros": (_written, lambda: nn.Linear(width, 2)),
        "half without gradient": (lambda m, x: m(x) * m(x.sin()).detach(), lambda: nn.Linear(width, 2)),
    }
    if len(shape) >= 2:
        ways |= {
            "time first": (lambda m, x: m(x.transpose(0, 1)).transpose(0, 1), lambda: nn.Linear(width, 2)),
            "folded": (lambda m, x: m(x.flatten(0, 1)).unflatten(0, x.shape[:2]), lambda: nn.Linear(width, 2)),
            "over positions": (lambda m, x: m(x.transpose(1, -1)).transpose(1, -1), lambda: nn.Linear(shape[0], 2)),
            "norm of channels last": (lambda m, x: m(x.movedim(1, -1)).movedim(-1, 1), lambda: nn.LayerNorm(shape[0])),
        }
    if len(shape) == 4:
        ways["frames"] = (lambda m, x: m(x.flatten(0, 1)).unflatten(0, x.shape[:2]), lambda: nn.Conv2d(shape[1], 2, 1))

    def around(name: str) -> nn.Module:
        function, make = ways[name]
        return Around(name, function, make())

    options: Options = {name: partial(around, name) for name in ways}
    options |= {
        "weight norm": lambda: parametrizations.weight_norm(nn.Linear(width, 3)),
        "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(width, 3)).eval(),
        "prelu": lambda: nn.PReLU(draw(st.sampled_from([1, shape[0]]))),
        "rms norm": lambda: nn.RMSNorm(width, eps=1e-5),
        "subclass": lambda: ScaledLinear(width, 2),
        "bilinear": lambda: Around("bilinear", lambda m, x: m(x, x.sin()), nn.Bilinear(width, width, 2)),
    }
    if len(shape) <= 3:
        n = max(len(shape) - 2, 0)
        options["batch norm"] = lambda: with_statistics((nn.BatchNorm1d, nn.BatchNorm2d)[n](shape[0]))
    if 2 <= len(shape) <= 4 and torch.Size(shape[1:]).numel() > 1:
        n = len(shape) - 2
        kinds = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
        options["instance norm"] = lambda: kinds[n](shape[0], affine=True)
    return options


def _written(module: nn.Module, x: Tensor) -> Tensor:
    y = x.new_zeros(*x.shape[:-1], 4)
    y[..., 1:3] = module(x)
    return y


def _of_sequences(draw: Draw, shape: Shape) -> Options:
    """Attention and recurrence over a sequence of vectors."""
    length, width = shape
    batch_first = draw(st.booleans())
    mask = draw(st.sampled_from([None, torch.ones(length, length, dtype=torch.bool).triu(1)]))
    weights = draw(st.booleans())
    layers, both = draw(st.integers(1, 2)), draw(st.booleans())

    def in_order(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return module(x) if batch_first else module(x.transpose(0, 1)).transpose(0, 1)

    def attend(module: nn.Module, x: Tensor) -> Tensor:
        return in_order(lambda x: module(x, x, x, attn_mask=mask, need_weights=weights)[0], x)

    def transform(module: nn.Module, x: Tensor) -> Tensor:
        return in_order(lambda x: module(x, src_mask=mask), x)

    def recur(module: nn.Module, x: Tensor) -> Tensor:
        return in_order(lambda x: module(x)[0], x)

    def encoder() -> nn.Module:
        return nn.TransformerEncoderLayer(
            width, 1, 3, dropout=0.0, batch_first=batch_first, norm_first=draw(st.booleans())
        ).train(draw(st.booleans()))

    def recurrent() -> nn.Module:
        kind: Any = draw(st.sampled_from([nn.RNN, nn.GRU, nn.LSTM]))
        module: nn.Module = kind(width, 2, layers, bidirectional=both, batch_first=batch_first)
        return module

    def cells(cell: nn.Module, x: Tensor) -> Tensor:
        h = None
        for t in range(length):
            h = cell(x[:, t], h)
        return h if isinstance(h, Tensor) else x

    return {
        "attention": lambda: Around("attention", attend, nn.MultiheadAttention(width, 1, batch_first=batch_first)),
        "encoder layer": lambda: Around("encoder layer", transform, encoder()),
        "recurrent": lambda: Around("recurrent", recur, recurrent()),
        "cells": lambda: Around("cells", cells, nn.GRUCell(width, 2)),
        "attention by hand": lambda: Around("by hand", _attention_by_hand, nn.Linear(width, 3 * width)),
        "learned queries": lambda: Around("queries", lambda p, x: (p @ x.mT).softmax(-1) @ x, _parameter(2, width)),
    }


def _attention_by_hand(module: nn.Module, x: Tensor) -> Any:
    q, k, v = module(x).chunk(3, dim=-1)
    return (q @ k.mT).softmax(-1) @ v


def _without_parameters(draw: Draw, shape: Shape) -> Options:
    """Functions that reduce, cut, repeat or reorder the entries of a sample."""
    dim = draw(st.integers(1, len(shape)))
    size = shape[dim - 1]
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "softmax": lambda x: x.softmax(dim),
        "cumsum": lambda x: x.cumsum(dim),
        "flip": lambda x: x.flip(dim),
        "roll": lambda x: x.roll(1, dim),
        "sort": lambda x: x.sort(dim).values,
        "index_select": lambda x: x.index_select(dim, torch.arange(size).flip(0)),
        "first half": lambda x: x.narrow(dim, 0, (size + 1) // 2),
        "repeat": lambda x: x.repeat_interleave(2, dim),
        "expand": lambda x: x.unsqueeze(1).expand(-1, 2, *x.shape[1:]),
        "stack": lambda x: torch.stack([x, x.cos()], dim),
        "stack in front": lambda x: torch.stack([x, x.cos()]).transpose(0, 1),
        "chunks exchanged": lambda x: torch.cat(x.chunk(2, dim)[::-1], dim),
        "pad": lambda x: F.pad(x, (1, 0)),
        "outer product": lambda x: x.flatten(1)[:, :3, None] * x.flatten(1)[:, None, :3],
        "in place on a copy": lambda x: x.clone().mul_(2).add_(1),
        "masked": lambda x: x.masked_fill(x < 0, 0.1),
    }
    if len(shape) > 1:
        functions |= {
            "mean": lambda x: x.mean(dim),
            "amax": lambda x: x.amax(dim),
            "logsumexp": lambda x: x.logsumexp(dim, keepdim=True),
            "last of a dimension": lambda x: x.select(dim, -1),
            "view of one position after the other": lambda x: x.reshape(-1, x.shape[-1]).sin().view(x.shape),
            "transposed and back": lambda x: x.transpose(0, dim).contiguous().cos().transpose(0, dim),
        }
    return {name: partial(Function, f"{name}, dim {dim}", function) for name, function in functions.items()}
