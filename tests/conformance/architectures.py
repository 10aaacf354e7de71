"""Hypothesis strategies for whole cases: chains of layers, the ways to use them, inputs and losses."""

from __future__ import annotations

import copy

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn

from .case import Case
from .layers import Draw, Piece, Shape, activation, beyond_the_list, embedding, listed_layers, output_shape
from .loss_kinds import losses
from .modules import InTurn, Model, Residual, SideBySide, TiedToEmbedding

_LARGEST = 300  # numbers in the activations of one sample, which keeps a case at some milliseconds
_VOCABULARY = 5
_WITH_PARAMETERS = {"conv", "conv transpose", "embedding", "group norm", "layer norm", "linear"}


@st.composite
def cases(draw: Draw) -> Case:
    """A model of one to four blocks, a batch of one to five samples, and a loss."""
    seed = draw(st.integers(0, 2**16))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokens = draw(st.sampled_from([False, False, True]))
        x_shape = draw(_token_shapes if tokens else _shapes)
        pieces = [draw(_of_tokens())] if tokens else []
        shape = _shape_of_tokens(pieces[0], x_shape) if tokens else x_shape
        for _ in range(draw(st.integers(0 if tokens else 1, 4))):
            pieces.append(draw(_block(shape)))
            shape = output_shape(pieces[-1].module, shape)
            assume(0 < torch.Size(shape).numel() <= _LARGEST)
        features = frozenset().union(*(piece.features for piece in pieces))
        unused = nn.Linear(2, 2) if draw(st.booleans()) else None
        if unused is not None:
            features |= {"unused"}
        model = Model(nn.Sequential(*(piece.module for piece in pieces)), unused).double()
        for parameter in model.parameters():
            # Away from the ones and zeros of initialisation, at which some errors vanish.
            parameter.data += 0.3 * torch.randn_like(parameter)
            if draw(st.integers(0, 7)) == 0:
                parameter.requires_grad_(False)
                features |= {"frozen"}
        size = draw(st.integers(1, 5))
        x = torch.randint(_VOCABULARY, (size, *x_shape)) if tokens else torch.randn(size, *x_shape).double()
        inputs, several = draw(_inputs(x, shape))
        loss = draw(losses(size, shape))
        features |= several | loss.features
    return Case(model, inputs, loss.targets, loss.given, features, loss.plain, seed)


_shapes = st.one_of(
    st.tuples(st.integers(1, 6)),
    st.tuples(st.integers(1, 4), st.integers(1, 6)),
    st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
)
_token_shapes = st.one_of(st.just(()), st.tuples(st.integers(1, 6)), st.tuples(st.integers(1, 3), st.integers(1, 3)))


@st.composite
def _of_tokens(draw: Draw) -> Piece:
    piece = draw(embedding(_VOCABULARY))
    if draw(st.integers(0, 5)) == 0 and isinstance(piece.module, nn.Embedding):
        return Piece(TiedToEmbedding(piece.module), piece.features | {"functional use"})
    return piece


def _shape_of_tokens(piece: Piece, shape: Shape) -> Shape:
    with torch.no_grad():
        return tuple(piece.module(torch.zeros(1, *shape, dtype=torch.long)).shape[1:])


@st.composite
def _block(draw: Draw, shape: Shape) -> Piece:
    """A layer, used in one of several ways, with an activation behind it or not."""
    piece = draw(beyond_the_list(shape) if draw(st.integers(0, 5)) == 0 else listed_layers(shape))
    features = piece.features
    ways = ["once", "once", "side by side"]
    if output_shape(piece.module, shape) == shape:
        ways += ["residual", "in turn", "tied"]
    way = draw(st.sampled_from(ways))
    module = piece.module
    if way == "side by side":
        module, features = SideBySide(module), features | {"twice"}
    elif way == "in turn":
        module, features = InTurn(module), features | {"twice"}
    elif way == "residual":
        module, features = Residual(module), features | {"residual"}
    elif way == "tied":
        module, features = nn.Sequential(module, nn.Tanh(), _tied(module)), features | {"tied"}
    if draw(st.booleans()):
        then = draw(activation(in_place=bool(features & _WITH_PARAMETERS)))
        module, features = nn.Sequential(module, then.module), features | then.features
    return Piece(module, features)


def _tied(module: nn.Module) -> nn.Module:
    """Another module of the same kind with the same parameters."""
    twin = copy.deepcopy(module)
    for (path, owner), (_, original) in zip(twin.named_modules(), module.named_modules(), strict=True):
        del path
        for name in owner._parameters:
            owner._parameters[name] = original._parameters[name]
    return twin


@st.composite
def _inputs(draw: Draw, x: Tensor, output: Shape) -> tuple[object, frozenset[str]]:
    way = draw(st.sampled_from(["tensor", "tensor", "tuple", "dict"]))
    shift = torch.randn(len(x), *output).double()
    if way == "tuple":
        return (x, shift), frozenset({"several inputs"})
    if way == "dict":
        return {"x": x, "shift": shift, "negate": True}, frozenset({"several inputs"})
    return x, frozenset()
