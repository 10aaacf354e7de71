"""The ways in which a model uses its layers: residuals and branches, in place, several times."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persample.testing.zoo.case import Case, Net, both, frozen, reals, tie


def _recurrence(model: Any, x: Tensor) -> Any:
    h = x.new_zeros(len(x), 3)
    for t in range(x.shape[1]):
        h = torch.tanh(model.inner(x[:, t]) + model.outer(h))
    return h


def _changed_part(model: Any, x: Tensor) -> Any:
    h: Tensor = model.inner(x)
    h[:, :2].mul_(3.0)
    return h


def _written_into(model: Any, x: Tensor) -> Any:
    h = x.new_zeros(len(x), 6)
    h[:, :3] = model.first(x)
    h[:, 3:] += model.second(x)
    return h


def _half_detached(model: Any, x: Tensor) -> Any:
    with torch.no_grad():
        constant = model.inner(x)
    return model.inner(x) * constant


def _thrown_away(model: Any, x: Tensor) -> Any:
    model.inner(x + 1)
    return model.inner(x) * model.inner(x - 1).detach()


RESIDUALS = (
    Case("Residual block", lambda: Net(lambda m, x: x + m.inner(x).tanh(), inner=nn.Linear(4, 4)), reals(4)),
    Case(
        "Residual convolution",
        lambda: Net(
            lambda m, x: F.relu(x + m.conv(F.relu(m.norm(x)))),
            norm=nn.GroupNorm(2, 4),
            conv=nn.Conv2d(4, 4, 3, padding=1),
        ),
        reals(4, 4, 4),
    ),
    Case(
        "Residual in place",
        lambda: Net(lambda m, x: m.first(x).sin().add_(m.second(x)), first=nn.Linear(4, 3), second=nn.Linear(4, 3)),
        reals(4),
    ),
    Case(
        "Densely connected block",
        lambda: Net(
            lambda m, x: m.second(torch.cat([x, m.first(x).relu()], 1)),
            first=nn.Conv2d(2, 3, 3, padding=1),
            second=nn.Conv2d(5, 2, 3, padding=1),
        ),
        reals(2, 4, 4),
    ),
    Case(
        "Gated branches",
        lambda: Net(lambda m, x: m.value(x) * m.gate(x).sigmoid(), value=nn.Linear(4, 3), gate=nn.Linear(4, 3)),
        reals(5, 4),
    ),
    Case(
        "One layer on every piece of the features",
        lambda: Net(lambda m, x: torch.cat([m.inner(p) for p in x.split(2, -1)], -1), inner=nn.Linear(2, 3)),
        reals(6),
    ),
    Case(
        "Squeeze and excitation",
        lambda: Net(
            lambda m, x: x * m.up(m.down(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None],
            down=nn.Linear(4, 2),
            up=nn.Linear(2, 4),
        ),
        reals(4, 3, 3),
    ),
)

IN_PLACE = (
    Case(
        "In-place activation behind a convolution",
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 2), nn.ELU(inplace=True)),
        reals(2, 4, 4),
    ),
    Case(
        "In-place activation behind a linear layer on a sequence",
        lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 3), nn.SiLU(inplace=True)),
        reals(5, 4),
    ),
    Case(
        "In-place activation behind a flattened convolution",
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.ReLU(inplace=True)),
        reals(2, 3, 3),
    ),
    Case(
        "In-place activation behind a convolution whose frozen weight leaves the bias",
        lambda: nn.Sequential(frozen(nn.Conv1d(2, 3, 2), "weight"), nn.ReLU(inplace=True)),
        reals(2, 4),
    ),
    Case(
        "In-place activation behind a norm",
        lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.LeakyReLU(inplace=True)),
        reals(4, 3),
    ),
    Case("In-place operation on a part", lambda: Net(_changed_part, inner=nn.Linear(4, 4)), reals(4)),
    Case(
        "Results written into a tensor",
        lambda: Net(_written_into, first=nn.Linear(4, 3), second=nn.Linear(4, 3)),
        reals(4),
    ),
)

SEVERAL_USES = (
    Case(
        "Tied weights",
        lambda: tie(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), **{"2.weight": "0.weight"}),
        reals(4),
    ),
    Case(
        "Tied weights on a sequence",
        lambda: tie(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), **{"2.weight": "0.weight"}),
        reals(5, 4),
    ),
    Case(
        "Tied scales and shifts of different layers",
        lambda: tie(
            nn.Sequential(nn.LayerNorm(4), nn.Tanh(), nn.GroupNorm(2, 4), nn.Linear(4, 4)),
            **{"2.weight": "0.weight", "3.bias": "0.bias"},
        ),
        reals(4),
    ),
    Case(
        "Autoencoder with a transposed weight",
        lambda: Net(lambda m, x: F.linear(m.inner(x).tanh(), m.inner.weight.t()), inner=nn.Linear(4, 3)),
        reals(4),
    ),
    Case(
        "One module twice in turn",
        lambda: Net(lambda m, x: m.inner(m.inner(x).tanh()), inner=nn.Linear(4, 4)),
        reals(4),
    ),
    Case(
        "One convolution twice in turn",
        lambda: Net(lambda m, x: m.inner(m.inner(x).tanh()), inner=nn.Conv2d(2, 2, 3, padding="same")),
        reals(2, 3, 3),
    ),
    Case(
        "One module in two branches",
        lambda: Net(lambda m, x: m.inner(x) + m.inner(x.sin() + 0.3), inner=nn.Linear(4, 3)),
        reals(4),
    ),
    Case(
        "One norm in two branches",
        lambda: Net(lambda m, x: m.inner(x) + m.inner(x.sin() + 0.3), inner=nn.LayerNorm(4)),
        reals(5, 4),
    ),
    Case("One module under two names", lambda: _shared(nn.Linear(4, 4)), reals(4)),
    Case(
        "One layer on inputs of different lengths",
        lambda: Net(lambda m, x: m.inner(x[:, :2]).sum(1) * m.inner(x[:, 2:]).sum(1), inner=nn.Linear(4, 3)),
        reals(5, 4),
    ),
    Case(
        "One layer on every step",
        lambda: Net(_recurrence, inner=nn.Linear(4, 3), outer=nn.Linear(3, 3, bias=False)),
        reals(4, 4),
    ),
    Case("One module twice, once without gradient", lambda: Net(_half_detached, inner=nn.Linear(4, 4)), reals(4)),
    Case("Results that are thrown away or detached", lambda: Net(_thrown_away, inner=nn.Linear(4, 4)), reals(4)),
    Case(
        "Siamese branches",
        lambda: Net(lambda m, x, y: (m.inner(x) - m.inner(y)).abs(), inner=nn.Linear(4, 3)),
        both(reals(4), reals(4)),
    ),
)


def _shared(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.Tanh(), layer)
