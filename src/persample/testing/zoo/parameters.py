"""Parameters that belong to no layer, and those that are computed from others."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from persample.testing.zoo.case import Case, Net, frozen, parameter, reals


class Symmetric(nn.Module):
    """A parametrization: the upper triangle, mirrored."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return the symmetric matrix."""
        return weight.triu() + weight.triu(1).mT


def _class_token(model: Any, x: Tensor) -> Any:
    x = torch.cat([model.token.expand(len(x), -1, -1), x], dim=1) + model.positions
    return model.linear(x)[:, 0]


def _lora(model: Any, x: Tensor) -> Any:
    return model.linear(x) + 2 * model.up(model.down(x))


def _mixture(model: Any, x: Tensor) -> Any:
    """Distances to learned centres, as in radial basis functions and codebooks."""
    return (x.unsqueeze(1) - model.centres).square().sum(-1).mul(-0.5).softmax(-1)


def _spectral_norm(training: bool) -> nn.Module:
    return parametrizations.spectral_norm(nn.Linear(4, 3)).train(training)


def _pruned() -> nn.Module:
    linear = nn.Linear(4, 3)
    prune.random_unstructured(linear, "weight", 0.5)
    return nn.Sequential(linear)


BARE = (
    Case("Scale", lambda: Net(lambda m, x: m.inner(x) * m.scale, inner=nn.Linear(4, 3), scale=parameter(3)), reals(4)),
    Case("Scale of a single number", lambda: Net(lambda m, x: m.scale * x, scale=parameter()), reals(4)),
    Case("Scale as long as the batch may be", lambda: Net(lambda m, x: x * m.scale, scale=parameter(4)), reals(4)),
    Case(
        "Layer scale",
        lambda: Net(
            lambda m, x: x + m.scale[:, None, None] * m.conv(x), scale=parameter(2), conv=nn.Conv2d(2, 2, 3, padding=1)
        ),
        reals(2, 3, 3),
    ),
    Case("Shift that is subtracted", lambda: Net(lambda m, x: m.shift - x, shift=parameter(4)), reals(3, 4)),
    Case("Scale that divides", lambda: Net(lambda m, x: x / m.scale.exp(), scale=parameter(4)), reals(3, 4)),
    Case("Power", lambda: Net(lambda m, x: x.exp() ** m.power, power=parameter(4)), reals(4)),
    Case(
        "Temperature",
        lambda: Net(lambda m, x: (x / F.softplus(m.temperature)).softmax(-1), temperature=parameter(1)),
        reals(4),
    ),
    Case(
        "Class token and positions",
        lambda: Net(_class_token, token=parameter(1, 1, 4), positions=parameter(1, 4, 4), linear=nn.Linear(4, 3)),
        reals(3, 4),
    ),
    Case(
        "Positions without a leading dimension",
        lambda: Net(lambda m, x: x + m.positions, positions=parameter(3, 4)),
        reals(3, 4),
    ),
    Case(
        "Positions, the first of them",
        lambda: Net(lambda m, x: x + m.positions[:, : x.shape[1]], positions=parameter(1, 6, 4)),
        reals(3, 4),
    ),
    Case("Matrix from the right", lambda: Net(lambda m, x: x @ m.matrix, matrix=parameter(4, 3)), reals(4)),
    Case("Matrix from the left", lambda: Net(lambda m, x: m.matrix @ x, matrix=parameter(3, 5)), reals(5, 4)),
    Case("Vector of scores", lambda: Net(lambda m, x: x @ m.vector, vector=parameter(4)), reals(5, 4)),
    Case(
        "Einsum",
        lambda: Net(lambda m, x: torch.einsum("bti,hio->bhto", x, m.heads), heads=parameter(2, 4, 3)),
        reals(5, 4),
    ),
    Case(
        "Gate between two inputs",
        lambda: Net(lambda m, x: torch.lerp(x, x.sin(), m.gate.sigmoid()), gate=parameter(4)),
        reals(4),
    ),
    Case(
        "Where",
        lambda: Net(
            lambda m, x: torch.where(x > 0, x * m.slope, m.constant), slope=parameter(4), constant=parameter(4)
        ),
        reals(4),
    ),
    Case(
        "Padding with a learned vector",
        lambda: Net(lambda m, x: torch.where((x > 1).any(-1, keepdim=True), m.mask, x), mask=parameter(4)),
        reals(5, 4),
    ),
    Case(
        "Learned initial state",
        lambda: Net(_from_initial_state, state=parameter(3), inner=nn.Linear(4, 3), outer=nn.Linear(3, 3)),
        reals(2, 4),
    ),
    Case(
        "Learned queries",
        lambda: Net(lambda m, x: (m.queries @ x.mT).softmax(-1) @ x, queries=parameter(2, 4)),
        reals(5, 4),
    ),
    Case("Radial basis functions", lambda: Net(_mixture, centres=parameter(3, 4)), reals(4)),
    Case(
        "Distances to centres",
        lambda: Net(lambda m, x: torch.cdist(x, m.centres), centres=parameter(3, 4)),
        reals(5, 4),
    ),
    Case(
        "List of parameters",
        lambda: Net(lambda m, x: sum(x * p for p in m.scales), scales=nn.ParameterList([parameter(4), parameter(4)])),
        reals(4),
    ),
    Case(
        "Output of parameters alone",
        lambda: Net(lambda m, x: m.mean.expand(len(x), -1) + 0 * x, mean=parameter(4)),
        reals(4),
    ),
)


def _from_initial_state(model: Any, x: Tensor) -> Any:
    h = model.state.expand(len(x), -1)
    for t in range(x.shape[1]):
        h = torch.tanh(model.inner(x[:, t]) + model.outer(h))
    return h


COMPUTED = (
    Case("Weight norm", lambda: parametrizations.weight_norm(nn.Linear(4, 3)), reals(4)),
    Case("Weight norm of a convolution", lambda: parametrizations.weight_norm(nn.Conv1d(2, 3, 2)), reals(2, 4)),
    Case("Spectral norm in eval mode", lambda: _spectral_norm(training=False), reals(4)),
    Case("Spectral norm in training mode", lambda: _spectral_norm(training=True), reals(4)),
    Case(
        "Spectral norm of a convolution in eval mode",
        lambda: parametrizations.spectral_norm(nn.Conv2d(2, 3, 2)).eval(),
        reals(2, 3, 3),
    ),
    Case("Orthogonal weight", lambda: parametrizations.orthogonal(nn.Linear(4, 4)), reals(4)),
    Case("Symmetric weight", lambda: _symmetric(), reals(4)),
    Case("Pruned weight", _pruned, reals(4)),
    Case(
        "LoRA of layers",
        lambda: Net(
            _lora, linear=frozen(nn.Linear(4, 4)), down=nn.Linear(4, 2, bias=False), up=nn.Linear(2, 4, bias=False)
        ),
        reals(5, 4),
    ),
    Case(
        "LoRA of a product of two parameters",
        lambda: Net(
            lambda m, x: F.linear(x, m.linear.weight + m.up @ m.down, m.linear.bias),
            linear=frozen(nn.Linear(4, 4)),
            up=parameter(4, 2),
            down=parameter(2, 4),
        ),
        reals(4),
    ),
    Case(
        "LoRA beside the trained weight",
        lambda: Net(
            lambda m, x: F.linear(x, m.linear.weight + m.up @ m.down, m.linear.bias),
            linear=nn.Linear(4, 4),
            up=parameter(4, 2),
            down=parameter(2, 4),
        ),
        reals(5, 4),
    ),
    Case(
        "Weight put together from two",
        lambda: Net(
            lambda m, x: F.linear(x, torch.cat([m.first, m.second])), first=parameter(2, 4), second=parameter(1, 4)
        ),
        reals(5, 4),
    ),
    Case(
        "Weight with a Kronecker structure",
        lambda: Net(
            lambda m, x: F.linear(x, torch.kron(m.first, m.second)), first=parameter(2, 2), second=parameter(1, 2)
        ),
        reals(4),
    ),
    Case("Positive weight", lambda: Net(lambda m, x: F.linear(x, F.softplus(m.raw)), raw=parameter(3, 4)), reals(4)),
    Case(
        "Slices of one parameter for two layers",
        lambda: Net(lambda m, x: F.linear(F.linear(x, m.all[:3]).tanh(), m.all[3:, :3]), all=parameter(5, 4)),
        reals(4),
    ),
    Case(
        "Convolution with a weight from a smaller network",
        lambda: Net(
            lambda m, x: F.conv1d(x, m.generator(m.code).view(3, 2, 2)), generator=nn.Linear(3, 12), code=torch.ones(3)
        ),
        reals(2, 4),
    ),
)


def _symmetric() -> nn.Module:
    linear = nn.Linear(4, 4)
    parametrize.register_parametrization(linear, "weight", Symmetric())
    return linear
