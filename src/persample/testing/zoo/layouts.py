"""Inner layouts in which dim 0 is not the sample, or not the sample alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from persample.testing.zoo.case import Case, Net, parameter, reals


def _time_first(model: Any, x: Tensor) -> Any:
    return model.inner(x.transpose(0, 1)).transpose(0, 1)


def _folded(model: Any, x: Tensor) -> Any:
    return model.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _channels_last(model: Any, x: Tensor) -> Any:
    return model.inner(x.movedim(1, -1)).movedim(-1, 1)


def _mixer(model: Any, x: Tensor) -> Any:
    x = x + model.tokens(x.mT).mT
    return x + model.channels(x)


def _stacked_states(model: Any, x: Tensor) -> Any:
    states = torch.stack([model.inner(x[:, t]).tanh() for t in range(x.shape[1])])
    return model.out(states).transpose(0, 1)


def _frames(model: Any, x: Tensor) -> Any:
    """A convolution on each frame of a film, then a layer on the sequence of frames."""
    frames = model.conv(x.view(-1, *x.shape[2:])).relu().mean((2, 3))
    return model.out(frames.view(*x.shape[:2], -1))


def _patches(model: Any, x: Tensor) -> Any:
    patches = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3)
    return model.inner(patches)


def _features_first(model: Any, x: Tensor) -> Any:
    return (model.weight @ x.t()).t()


CASES = (
    Case("Time-first layout", lambda: Net(_time_first, inner=nn.Linear(4, 3)), reals(5, 4)),
    Case("Time-first norm", lambda: Net(_time_first, inner=nn.LayerNorm(4)), reals(5, 4)),
    Case(
        "Time-first layout within",
        lambda: Net(_stacked_states, inner=nn.Linear(4, 3), out=nn.Linear(3, 2)),
        reals(5, 4),
    ),
    Case(
        "Time-first scale",
        lambda: Net(lambda m, x: (x.transpose(0, 1) * m.scale).transpose(0, 1), scale=parameter(4)),
        reals(5, 4),
    ),
    Case("Folded layout", lambda: Net(_folded, inner=nn.Linear(4, 3)), reals(5, 4)),
    Case("Folded layout with one position", lambda: Net(_folded, inner=nn.Linear(4, 3)), reals(1, 4)),
    Case("Folded convolution", lambda: Net(_frames, conv=nn.Conv2d(2, 3, 2), out=nn.Linear(3, 2)), reals(3, 2, 3, 3)),
    Case(
        "Folded scale",
        lambda: Net(lambda m, x: (x.flatten(0, 1) * m.scale).view(x.shape), scale=parameter(4)),
        reals(5, 4),
    ),
    Case(
        "Channels-last layout",
        lambda: Net(_channels_last, inner=nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3))),
        reals(3, 4, 2),
    ),
    Case(
        "Mixer of tokens and channels",
        lambda: Net(_mixer, tokens=nn.Linear(5, 5), channels=nn.Linear(4, 4)),
        reals(5, 4),
    ),
    Case("Patches of an image", lambda: Net(_patches, inner=nn.Linear(8, 3)), reals(2, 4, 4)),
    Case("Samples in the last dimension", lambda: Net(_features_first, weight=parameter(3, 4)), reals(4)),
    Case(
        "Pixel shuffle",
        lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.PixelShuffle(2), nn.Conv2d(1, 2, 2)),
        reals(2, 3, 3),
    ),
    Case(
        "Channel shuffle",
        lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.ChannelShuffle(2), nn.Conv2d(4, 2, 2, groups=2)),
        reals(2, 3, 3),
    ),
    Case(
        "Upsampling",
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.Upsample(scale_factor=2), nn.Conv2d(3, 2, 2)),
        reals(2, 3, 3),
    ),
)
