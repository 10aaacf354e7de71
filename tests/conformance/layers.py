"""Hypothesis strategies for single layers that accept an input of a given shape (of one sample, without dim B)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from .modules import BareScale, ByMethod, FirstOutput, Folded, Permute, ScaledLinear, SelfAttention, TimeFirst

Shape = tuple[int, ...]
Draw = st.DrawFn


@dataclass(frozen=True)
class Piece:
    """A module and what a backend must know for it, see `backend_promises`."""

    module: nn.Module
    features: frozenset[str] = field(default_factory=frozenset)


def _features(*names: str, **optional: bool) -> frozenset[str]:
    """The given names, and the optional ones whose value holds (underscores stand for blanks)."""
    return frozenset(names) | {name.replace("_", " ") for name, holds in optional.items() if holds}


def _int_or_tuple(draw: Draw, values: list[int]) -> int | tuple[int, ...]:
    """The same number once, where all are equal and chance says so."""
    return values[0] if len(set(values)) == 1 and draw(st.booleans()) else tuple(values)


@st.composite
def linear(draw: Draw, shape: Shape) -> Piece:
    bias = draw(st.booleans())
    module = nn.Linear(shape[-1], draw(st.integers(1, 4)), bias=bias)
    return Piece(module, _features("linear", leading_dimensions=len(shape) > 1, no_bias=not bias))


@st.composite
def convolution(draw: Draw, shape: Shape) -> Piece:
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
    groups = draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0]))
    bias = draw(st.booleans())
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
    module = layer(
        channels,
        groups * draw(st.integers(1, 2)),
        _int_or_tuple(draw, kernel),
        stride=_int_or_tuple(draw, stride),
        padding=kind if kind != "numbers" else _int_or_tuple(draw, padding),
        dilation=_int_or_tuple(draw, dilation),
        groups=groups,
        bias=bias,
        padding_mode=mode,
    )
    return Piece(
        module,
        _features(
            "conv",
            **{"3d": n == 3},
            no_bias=not bias,
            stride=max(stride) > 1,
            dilation=max(dilation) > 1,
            groups=groups > 1,
            padding_same=kind == "same",
            padding_valid=kind == "valid",
            padding_mode=mode != "zeros",
        ),
    )


@st.composite
def transposed_convolution(draw: Draw, shape: Shape) -> Piece:
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
    groups = draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0]))
    bias = draw(st.booleans())
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[n - 1]
    module = layer(
        channels,
        groups * draw(st.integers(1, 2)),
        _int_or_tuple(draw, kernel),
        stride=_int_or_tuple(draw, stride),
        padding=_int_or_tuple(draw, padding),
        output_padding=_int_or_tuple(draw, output_padding),
        groups=groups,
        bias=bias,
        dilation=_int_or_tuple(draw, dilation),
    )
    return Piece(
        module,
        _features(
            "conv transpose",
            **{"3d": n == 3},
            no_bias=not bias,
            stride=max(stride) > 1,
            dilation=max(dilation) > 1,
            groups=groups > 1,
            output_padding=max(output_padding) > 0,
        ),
    )


@st.composite
def embedding(draw: Draw, vocabulary: int) -> Piece:
    padding_index = draw(st.none() | st.integers(-vocabulary, vocabulary - 1))
    module = nn.Embedding(vocabulary, draw(st.integers(1, 4)), padding_idx=padding_index)
    return Piece(module, _features("embedding", padding_index=padding_index is not None))


@st.composite
def layer_norm(draw: Draw, shape: Shape) -> Piece:
    normalized = shape[-draw(st.integers(1, min(2, len(shape)))) :]
    affine, bias = draw(st.booleans()), draw(st.booleans())
    module = nn.LayerNorm(normalized, elementwise_affine=affine, bias=bias)
    return Piece(module, _features("layer norm", no_affine=not affine, norm_shift_missing=affine and not bias))


@st.composite
def group_norm(draw: Draw, shape: Shape) -> Piece:
    # PyTorch takes no group of a single number.
    groups = draw(st.sampled_from([g for g in (1, 2, 3) if shape[0] % g == 0 and math.prod(shape) > g]))
    affine = draw(st.booleans())
    return Piece(nn.GroupNorm(groups, shape[0], affine=affine), _features("group norm", no_affine=not affine))


@st.composite
def pooling(draw: Draw, shape: Shape) -> Piece:
    n = len(shape) - 1
    kernel = draw(st.integers(1, min(2, *shape[1:])))
    stride = draw(st.integers(1, 2))
    options: list[Callable[[], nn.Module]] = [
        lambda: (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[n - 1](kernel, stride, ceil_mode=draw(st.booleans())),
        lambda: (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[n - 1](kernel, stride, padding=kernel // 2),
        lambda: (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[n - 1](draw(st.integers(1, 2))),
    ]
    return Piece(draw(st.sampled_from(options))(), _features("pooling"))


@st.composite
def activation(draw: Draw, in_place: bool = False) -> Piece:
    if in_place and draw(st.booleans()):
        kinds = [nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.Hardtanh, nn.CELU, nn.Mish]
        return Piece(draw(st.sampled_from(kinds))(inplace=True), _features("activation", "in place"))
    kinds = [nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softsign]
    return Piece(draw(st.sampled_from(kinds))(), _features("activation"))


@st.composite
def dropout(draw: Draw, shape: Shape) -> Piece:
    kinds: list[type[nn.Module]] = [nn.Dropout, nn.Dropout, nn.AlphaDropout]
    if len(shape) > 1:
        kinds.append((nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)[len(shape) - 2])
    module = draw(st.sampled_from(kinds))(draw(st.sampled_from([0.3, 0.5])))  # type: ignore[call-arg]
    training = draw(st.booleans())
    return Piece(module.train(training), _features("dropout", random_numbers=training))


@st.composite
def rearrangement(draw: Draw, shape: Shape) -> Piece:
    order = draw(st.permutations(range(len(shape))))
    return Piece(draw(st.sampled_from([nn.Flatten(), Permute(*order)])), _features("flatten"))


@st.composite
def beyond_the_list(draw: Draw, shape: Shape) -> Piece:
    """A layer, or a way to use one, that a backend may refuse."""
    width = shape[-1]
    options: dict[str, Callable[[], nn.Module]] = {
        "bare parameter": lambda: BareScale(width),
        "method of a module": lambda: ByMethod(nn.Linear(width, 2)),
        "parametrization": lambda: parametrizations.weight_norm(nn.Linear(width, 3)),
        "prelu": lambda: nn.PReLU(shape[0] if draw(st.booleans()) else 1),
        "rms norm": lambda: nn.RMSNorm(width, eps=1e-5),
        "subclass": lambda: ScaledLinear(width, 2),
    }
    if len(shape) == 2:
        options |= {
            "attention": lambda: SelfAttention(nn.MultiheadAttention(width, 1, batch_first=True)),
            "recurrent": lambda: FirstOutput(
                draw(st.sampled_from([nn.RNN, nn.GRU, nn.LSTM]))(width, 2, batch_first=True)
            ),
        }
    if 2 <= len(shape) <= 4:
        n = len(shape) - 2
        options["batch norm in eval mode"] = lambda: _with_statistics(
            (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[n](shape[0])
        )
        if math.prod(shape[1:]) > 1:
            options["instance norm"] = lambda: (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[n](
                shape[0], affine=True
            )
        options["time-first layout"] = lambda: TimeFirst(nn.Linear(width, 2))
        options["folded layout"] = lambda: Folded(nn.Linear(width, 2))
    name = draw(st.sampled_from(sorted(options)))
    return Piece(options[name](), _features(name))


def _with_statistics(module: nn.Module) -> nn.Module:
    module.running_mean.normal_()
    module.running_var.uniform_(0.5, 2)
    return module.eval()


def listed_layers(shape: Shape) -> st.SearchStrategy[Piece]:
    """Any of the layers that the documentation lists, for an input of this shape."""
    # Written several times, the layers with the most options come more often.
    strategies = [linear(shape), linear(shape), layer_norm(shape), activation(), dropout(shape), rearrangement(shape)]
    if math.prod(shape) > 1:
        strategies.append(group_norm(shape))
    if 2 <= len(shape) <= 4:
        strategies += [convolution(shape)] * 4 + [transposed_convolution(shape)] * 3 + [pooling(shape)]
    return st.one_of(strategies)


def output_shape(module: nn.Module, shape: Shape) -> Shape:
    """The shape that `module` makes of a sample of the given one."""
    with torch.no_grad():
        return tuple(module(torch.zeros(1, *shape)).shape[1:])
