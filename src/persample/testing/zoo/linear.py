"""Linear layers."""

from __future__ import annotations

import torch
from torch import nn

from persample.testing.zoo.case import Case, both, reals

CASES = (
    Case("Linear", lambda: nn.Linear(4, 3), reals(4)),
    Case("Linear without bias", lambda: nn.Linear(4, 3, bias=False), reals(4)),
    Case("Linear on a sequence", lambda: nn.Linear(4, 3), reals(5, 4)),
    Case("Linear on a sequence without bias", lambda: nn.Linear(4, 3, bias=False), reals(5, 4)),
    Case("Linear on a grid", lambda: nn.Linear(4, 3), reals(2, 3, 2, 4)),
    Case("Linear of one input and one output", lambda: nn.Linear(1, 1), reals(1)),
    Case("Linear without outputs", lambda: nn.Linear(4, 0), reals(4)),
    Case("Linear on a transposed sequence", lambda: nn.Linear(4, 3), lambda size: torch.randn(size, 4, 5).mT),
    Case(
        "Linear on an expanded input", lambda: nn.Linear(4, 3), lambda size: torch.randn(size, 1, 4).expand(size, 5, 4)
    ),
    Case("MLP", lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.GELU()), reals(4)),
    Case("Bilinear", lambda: nn.Bilinear(4, 2, 3), both(reals(4), reals(2))),
    Case("Bilinear on a sequence", lambda: nn.Bilinear(4, 2, 3, bias=False), both(reals(5, 4), reals(5, 2))),
    Case("PReLU", lambda: nn.Sequential(nn.Linear(4, 3), nn.PReLU()), reals(4)),
    Case("PReLU of each channel", lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.PReLU(3)), reals(2, 4)),
)
