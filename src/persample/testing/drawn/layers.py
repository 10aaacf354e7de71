"""Hypothesis strategies for the layers that every engine of rules knows, for an input of a given shape.

A shape is that of one sample, without dim B.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from hypothesis import strategies as st
from torch import nn

from persample.testing.drawn.functions import Function

Shape = tuple[int, ...]
Draw = st.DrawFn


def _int_or_tuple(draw: Draw, values: list[int]) -> int | tuple[int, ...]:
    """The same number once, where all are equal and chance says so."""
    return values[0] if len(set(values)) == 1 and draw(st.booleans()) else tuple(values)


@st.composite
def linear(draw: Draw, shape: Shape) -> nn.Module:
    """Any `nn.Linear`."""
    return nn.Linear(shape[-1], draw(st.integers(1, 4)), bias=draw(st.booleans()))


@st.composite
def convolution(draw: Draw, shape: Shape) -> nn.Module:
    """Any convolution."""
    channels, *sizes = shape
    n = len(sizes)
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    kind = draw(st.sampled_from(["numbers", "numbers", "same", "valid"]))
    dilation = [draw(st.integers(1, 2)) for _ in sizes]
    # Reflection reaches less than the size of the input, circular padding as far as it.
    reach = [{"reflect": size - 1, "circular": size}.get(mode, 2) for size in sizes]
    padding = [draw(st.integers(0, min(2, r))) if kind == "numbers" else 0 for r in reach]
    kernel = []
    for d in range(n):
        room = sizes[d] + 2 * padding[d]
        longest = (room - 1) // dilation[d] + 1
        if kind == "same":
            # The larger half of the padding is half of the window, rounded up.
            longest = min(3, 1 + 2 * reach[d] // dilation[d])
            while (dilation[d] * (longest - 1) + 1) // 2 > reach[d]:
                longest -= 1
        kernel.append(draw(st.integers(1, max(1, min(3, longest)))))
    stride = [1 if kind == "same" else draw(st.integers(1, 3)) for _ in sizes]
    groups = _groups(draw, channels)
    layer: type[nn.Module] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
    return layer(
        channels,
        groups * draw(st.integers(1, 2)),
        _int_or_tuple(draw, kernel),
        stride=_int_or_tuple(draw, stride),
        padding=kind if kind != "numbers" else _int_or_tuple(draw, padding),
        dilation=_int_or_tuple(draw, dilation),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    )


@st.composite
def transposed_convolution(draw: Draw, shape: Shape) -> nn.Module:
    """Any transposed convolution."""
    channels, *sizes = shape
    n = len(sizes)
    stride = [draw(st.integers(1, 3)) for _ in sizes]
    dilation = [draw(st.integers(1, 2)) for _ in sizes]
    kernel = [draw(st.integers(1, 3)) for _ in sizes]
    output_padding = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
    padding = []
    for d in range(n):
        full = (sizes[d] - 1) * stride[d] + dilation[d] * (kernel[d] - 1) + output_padding[d] + 1
        padding.append(draw(st.integers(0, min(2, (full - 1) // 2))))
    groups = _groups(draw, channels)
    layer: type[nn.Module] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[n - 1]
    return layer(
        channels,
        groups * draw(st.integers(1, 2)),
        _int_or_tuple(draw, kernel),
        stride=_int_or_tuple(draw, stride),
        padding=_int_or_tuple(draw, padding),
        output_padding=_int_or_tuple(draw, output_padding),
        groups=groups,
        bias=draw(st.booleans()),
        dilation=_int_or_tuple(draw, dilation),
    )


def _groups(draw: Draw, channels: int) -> int:
    return draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0]))


@st.composite
def embedding(draw: Draw, vocabulary: int) -> nn.Embedding:
    """Any `nn.Embedding` of `vocabulary` words."""
    padding_index = draw(st.none() | st.integers(-vocabulary, vocabulary - 1))
    return nn.Embedding(vocabulary, draw(st.integers(1, 4)), padding_idx=padding_index)


@st.composite
def layer_norm(draw: Draw, shape: Shape) -> nn.Module:
    """Any `nn.LayerNorm` over one or two dimensions."""
    normalized = shape[-draw(st.integers(1, min(2, len(shape)))) :]
    return nn.LayerNorm(normalized, elementwise_affine=draw(st.booleans()), bias=draw(st.booleans()))


@st.composite
def group_norm(draw: Draw, shape: Shape) -> nn.Module:
    """Any `nn.GroupNorm`."""
    # PyTorch takes no group of a single number.
    groups = draw(st.sampled_from([g for g in (1, 2, 3) if shape[0] % g == 0 and math.prod(shape) > g]))
    return nn.GroupNorm(groups, shape[0], affine=draw(st.booleans()))


@st.composite
def pooling(draw: Draw, shape: Shape) -> nn.Module:
    """Maxima or averages over windows."""
    n = len(shape) - 1
    kernel = draw(st.integers(1, min(2, *shape[1:])))
    stride = draw(st.integers(1, 2))
    options: list[Callable[[], nn.Module]] = [
        lambda: (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[n - 1](kernel, stride, ceil_mode=draw(st.booleans())),
        lambda: (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[n - 1](kernel, stride, padding=kernel // 2),
        lambda: (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[n - 1](draw(st.integers(1, 2))),
    ]
    return draw(st.sampled_from(options))()


def activation() -> st.SearchStrategy[nn.Module]:
    """Any activation."""
    kinds = [nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softsign]
    return st.sampled_from(kinds).map(lambda kind: kind())


def activation_in_place() -> st.SearchStrategy[nn.Module]:
    """Any activation in place."""
    kinds: list[type[nn.Module]] = [nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.Hardtanh, nn.CELU, nn.Mish]
    return st.sampled_from(kinds).map(lambda kind: kind(inplace=True))


@st.composite
def dropout(draw: Draw, shape: Shape) -> nn.Module:
    """Dropout of entries or channels, in training or eval mode."""
    kinds: list[type[nn.Module]] = [nn.Dropout, nn.Dropout, nn.AlphaDropout]
    if 2 <= len(shape) <= 4:
        kinds.append((nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)[len(shape) - 2])
    return draw(st.sampled_from(kinds))(draw(st.sampled_from([0.3, 0.5]))).train(draw(st.booleans()))


@st.composite
def rearrangement(draw: Draw, shape: Shape) -> nn.Module:
    """The entries of a sample in another shape or order."""
    order = tuple(1 + d for d in draw(st.permutations(range(len(shape)))))
    options: list[Callable[[], nn.Module]] = [
        lambda: nn.Flatten(),
        lambda: Function(f"permute{order}", lambda x: x.permute(0, *order)),
    ]
    divisors = [d for d in (2, 3) if shape[-1] % d == 0]
    if divisors and len(shape) < 4:
        parts = draw(st.sampled_from(divisors))
        options.append(partial(nn.Unflatten, -1, (parts, shape[-1] // parts)))
    return draw(st.sampled_from(options))()


def layers(shape: Shape) -> st.SearchStrategy[nn.Module]:
    """Any of the layers of this file."""
    # Written several times, the layers with the most options come more often.
    strategies = [linear(shape), linear(shape), layer_norm(shape), activation(), dropout(shape), rearrangement(shape)]
    if math.prod(shape) > 1:
        strategies.append(group_norm(shape))
    if 2 <= len(shape) <= 4:
        strategies += [convolution(shape)] * 4 + [transposed_convolution(shape)] * 3 + [pooling(shape)]
    return st.one_of(strategies)


def output_shape(module: nn.Module, *shapes: Shape) -> Shape:
    """Return the shape that `module` makes of samples of the given ones."""
    with torch.no_grad(), torch.random.fork_rng():
        return tuple(module(*(torch.zeros(2, *shape, dtype=torch.float64) for shape in shapes)).shape[1:])
