"""Other dtypes than float64, in which all the rest of the zoo is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from persample.testing.zoo.case import Case, Net, reals, tokens

_CNN = lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))  # noqa: E731


def _transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Embedding(6, 4), layer, nn.Linear(4, 3))


CASES = (
    Case("Convolutions in float32", _CNN, reals(2, 4, 4), dtype=torch.float32),
    Case("Transformer in float32", _transformer, tokens(5), dtype=torch.float32),
    Case(
        "MLP under autocast",
        lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)),
        reals(4),
        dtype=torch.float32,
        autocast=torch.bfloat16,
    ),
    Case("Convolutions under autocast", _CNN, reals(2, 4, 4), dtype=torch.float32, autocast=torch.bfloat16),
    Case("Transformer under autocast", _transformer, tokens(5), dtype=torch.float32, autocast=torch.bfloat16),
    Case(
        "Autocast within the model",
        lambda: Net(_under_autocast, first=nn.Linear(4, 8), second=nn.Linear(8, 3)),
        reals(5, 4),
        dtype=torch.float32,
        autocast=torch.bfloat16,
    ),
)


def _under_autocast(model: Any, x: Tensor) -> Any:
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        h = torch.tanh(model.first(x))  # of a ReLU rounding decides which entries near 0 get a gradient
    return model.second(h.float())
