"""The ways in which layers are called: by keyword, by a subclass, checkpointed, with dropout, frozen, or not at all."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from persample.testing.zoo.case import Case, Net, both, frozen, reals


class ScaledLinear(nn.Linear):
    """A subclass of a known layer that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        """Return twice the layer's output on tanh(input)."""
        return 2 * super().forward(input.tanh())


class CausalConv(nn.Conv1d):
    """A subclass of a known layer that pads on one side."""

    def forward(self, input: Tensor) -> Tensor:
        """Return one output for each position, of that and the positions before."""
        return super().forward(F.pad(input, (self.kernel_size[0] - 1, 0)))


class ScaledEmbedding(nn.Embedding):
    """A subclass of a known layer that scales its output, as in transformers."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows times the root of their length."""
        return super().forward(input).mul(self.embedding_dim**0.5)


class SameName(nn.Linear):
    """A subclass of a known layer that computes the same."""


def _with_hooks_of_the_user() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    model[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return model


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


CALLS = (
    Case("Layer called with a keyword", lambda: Net(lambda m, x: m.inner(input=x), inner=nn.Linear(4, 4)), reals(4)),
    Case("Layer called by its method", lambda: Net(lambda m, x: m.inner.forward(x), inner=nn.Linear(4, 3)), reals(4)),
    Case("Hooks of the user that change inputs and outputs", _with_hooks_of_the_user, reals(4)),
    Case("Subclass of Linear that computes something else", lambda: ScaledLinear(4, 3), reals(4)),
    Case("Subclass of Linear that computes the same", lambda: SameName(4, 3), reals(4)),
    Case("Subclass of Conv1d that pads on one side", lambda: CausalConv(2, 3, 2), reals(2, 4)),
    Case("Subclass of Embedding that scales", lambda: ScaledEmbedding(6, 4), lambda size: torch.randint(6, (size, 3))),
    Case(
        "Tuple of inputs",
        lambda: Net(_two_inputs, left=nn.Linear(4, 3), right=nn.Linear(2, 3)),
        both(reals(4), reals(2), lambda _: 0.5),
    ),
    Case(
        "Dict of inputs",
        lambda: Net(_two_inputs, left=nn.Linear(4, 3), right=nn.Linear(2, 3)),
        lambda size: {"y": torch.randn(size, 2), "x": torch.randn(size, 4), "scale": 0.5},
    ),
    Case(
        "Nested inputs, some of them None",
        lambda: Net(lambda m, pair, mask=None: m.inner(pair[0] * pair[1]["y"]), inner=nn.Linear(4, 3)),
        lambda size: ((torch.randn(size, 4), {"y": torch.randn(size, 4)}), None),
    ),
    Case(
        "Activation checkpointing",
        lambda: Net(lambda m, x: checkpoint(m.inner, x, use_reentrant=False), inner=_mlp()),
        reals(4),
    ),
    Case(
        "Activation checkpointing of convolutions in turn",
        lambda: Net(
            lambda m, x: checkpoint(m.second, checkpoint(m.first, x, use_reentrant=False), use_reentrant=False),
            first=nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU()),
            second=nn.Sequential(nn.GroupNorm(1, 3), nn.Conv2d(3, 2, 2)),
        ),
        reals(2, 4, 4),
    ),
    Case(
        "Activation checkpointing with dropout",
        lambda: Net(
            lambda m, x: checkpoint(m.inner, x, use_reentrant=False),
            inner=nn.Sequential(nn.Linear(4, 5), nn.Dropout(), nn.Linear(5, 3)),
        ),
        reals(4),
    ),
)


def _two_inputs(model: Any, x: Tensor, y: Tensor, scale: float = 1.0) -> Any:
    return model.left(x) + scale * model.right(y).tanh()


FROZEN_AND_UNUSED = (
    Case("Frozen layer", lambda: nn.Sequential(frozen(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)), reals(4)),
    Case("Frozen weight, trained bias", lambda: frozen(_mlp(), "2.weight"), reals(4)),
    Case(
        "Frozen layer behind a trained one",
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), frozen(nn.Linear(5, 3))),
        reals(4),
    ),
    Case("All frozen", lambda: frozen(nn.Linear(4, 3)), reals(4)),
    Case("No parameters", lambda: nn.Tanh(), reals(4)),
    Case("Unused layer", lambda: Net(lambda m, x: m.taken(x), taken=nn.Linear(4, 3), unused=nn.Linear(4, 3)), reals(4)),
    Case("No layer that is used", lambda: Net(lambda m, x: x.sin(), unused=nn.Linear(4, 3)), reals(4)),
    Case("Detached model", lambda: Net(lambda m, x: m.inner(x).detach(), inner=nn.Linear(4, 3)), reals(4)),
    Case(
        "Empty parameter",
        lambda: Net(lambda m, x: m.inner(x), inner=nn.Linear(4, 3), empty=nn.Parameter(torch.zeros(0))),
        reals(4),
    ),
)

DROPOUT = (
    Case(
        "Dropout in eval mode", lambda: nn.Sequential(nn.Linear(4, 5), nn.Dropout(), nn.Linear(5, 3)).eval(), reals(4)
    ),
    Case(
        "Dropout in training mode",
        lambda: nn.Sequential(
            nn.Linear(4, 5), nn.Dropout(), nn.Linear(5, 5), nn.Dropout(0.3, inplace=True), nn.Linear(5, 3)
        ),
        reals(4),
    ),
    Case(
        "Dropout of channels",
        lambda: nn.Sequential(nn.Conv2d(2, 4, 2), nn.Dropout2d(), nn.Conv2d(4, 2, 2)),
        reals(2, 4, 4),
    ),
    Case(
        "Alpha dropout",
        lambda: nn.Sequential(nn.Linear(4, 5), nn.SELU(), nn.AlphaDropout(0.3), nn.Linear(5, 3)),
        reals(4),
    ),
    Case(
        "Functional dropout", lambda: Net(lambda m, x: m.inner(F.dropout(x, 0.3)), inner=nn.Linear(4, 3)), reals(5, 4)
    ),
    Case("Noise", lambda: Net(lambda m, x: m.inner(x + torch.randn_like(x)), inner=nn.Linear(4, 3)), reals(4)),
)
