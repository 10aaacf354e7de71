"""Convolutions of one, two and three dimensions and their transposes, with every option."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from persample.testing.zoo.case import Case, Net, reals

# fmt: off
_OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    " without bias": {"bias": False},
    " with stride that leaves a rest": {"stride": 2},
    " with stride longer than the window": {"stride": 4},
    " with padding": {"padding": 2},
    " with padding 'same'": {"padding": "same"},
    " with padding 'valid'": {"padding": "valid"},
    " with dilation": {"dilation": 2},
    " with dilated padding 'same'": {"padding": "same", "dilation": 2},
    " with groups": {"groups": 2},
    " depthwise": {"groups": 4, "out_channels": 8},
    " with reflected padding": {"padding": 1, "padding_mode": "reflect"},
    " with replicated padding": {"padding": 2, "padding_mode": "replicate"},
    " with circular padding": {"padding": 1, "padding_mode": "circular"},
    " with circular padding 'same'": {"padding": "same", "padding_mode": "circular"},
    " with everything": {
        "stride": 2, "padding": 2, "dilation": 2, "groups": 2, "padding_mode": "replicate", "bias": False,
    },
}
_TRANSPOSED_OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    " without bias": {"bias": False},
    " with stride": {"stride": 2},
    " with padding": {"padding": 1},
    " with output padding": {"stride": 3, "output_padding": 2},
    " with dilation": {"dilation": 2},
    " with groups": {"groups": 2},
    " with everything": {
        "stride": 2, "padding": 2, "output_padding": 1, "dilation": 2, "groups": 2, "bias": False,
    },
}
# fmt: on


def _with_options() -> Iterator[Case]:
    for n in (1, 2, 3):
        layer, transposed = getattr(nn, f"Conv{n}d"), getattr(nn, f"ConvTranspose{n}d")
        size = 5 if n == 3 else 7
        for label, options in _OPTIONS.items():
            # A window of even length needs unequal padding on the two sides.
            options = {"out_channels": 2, "kernel_size": 2 if "same" in label and n == 1 else 3} | options
            yield Case(f"Conv{n}d{label}", partial(layer, 4, **options), reals(4, *[size] * n))
        for label, options in _TRANSPOSED_OPTIONS.items():
            options = {"out_channels": 2, "kernel_size": 3} | options
            name = f"ConvTranspose{n}d{label}"
            yield Case(name, partial(transposed, 4, **options), reals(4, *[3] * n))


CASES = (
    *_with_options(),
    Case(
        "Conv2d with different numbers along each dimension",
        lambda: nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
        reals(2, 6, 5),
    ),
    Case(
        "Conv2d on a channels-last image",
        lambda: nn.Conv2d(2, 3, 2),
        lambda size: torch.randn(size, 2, 4, 4).to(memory_format=torch.channels_last),
    ),
    Case("Conv2d with a window of one", lambda: nn.Conv2d(2, 3, 1), reals(2, 4, 4)),
    Case("Conv2d with one output position", lambda: nn.Conv2d(2, 3, 4), reals(2, 4, 4)),
    Case(
        "LeNet",
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(3, 4, 2),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        reals(1, 8, 8),
    ),
    Case(
        "Autoencoder",
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, stride=2), nn.ELU(), nn.ConvTranspose2d(3, 1, 3, stride=2, output_padding=1)
        ),
        reals(1, 6, 6),
    ),
    Case(
        "Transposed convolution with an output size of its own",
        lambda: Net(lambda m, x: m.layer(x, output_size=[8, 8]), layer=nn.ConvTranspose2d(2, 3, 3, stride=2)),
        reals(2, 3, 3),
    ),
    Case("Fold of unfolded patches", lambda: _patches(), reals(2, 4, 4)),
)


def _patches() -> nn.Module:
    """A convolution as a linear layer on patches."""
    return nn.Sequential(nn.Unfold(2), nn.Conv1d(8, 8, 1), nn.Fold((4, 4), 2))
