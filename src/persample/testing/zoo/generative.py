"""Small generative and implicit models: flows, densities, autoencoders, fixed points."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persample.testing.zoo.case import Case, Net, parameter, reals


def _conditional_random_field(model: Any, x: Tensor) -> Any:
    score = x[:, 0]
    for t in range(1, x.shape[1]):
        score = (score.unsqueeze(2) + model.transitions).logsumexp(1) + x[:, t]
    return score


def _vector_quantised(model: Any, x: Tensor) -> Any:
    nearest = model.code[torch.cdist(x, model.code).argmin(-1)]
    return torch.cat([x + (nearest - x).detach(), nearest], dim=-1)


def _autoregressive(model: Any, x: Tensor) -> Any:
    state, outputs = model.start.expand(len(x), -1), []
    for d in range(x.shape[1]):
        outputs.append(state.sigmoid() @ model.out[d] + model.bias[d])
        state = state + x[:, d : d + 1] * model.into[:, d]
    return torch.stack(outputs, 1)


def _coupling(model: Any, x: Tensor) -> Any:
    kept, changed = x.chunk(2, -1)
    scale, shift = model.network(kept).chunk(2, -1)
    return torch.cat([kept, changed * scale.tanh().exp() + shift], -1)


def _invertible_convolution(model: Any, x: Tensor) -> Any:
    volume = torch.linalg.slogdet(model.matrix)[1]
    return torch.cat([F.conv1d(x, model.matrix.unsqueeze(-1)).flatten(1), volume.expand(len(x), 1)], 1)


def _variational(model: Any, x: Tensor) -> Any:
    mean, deviation = model.encoder(x).chunk(2, -1)
    return model.decoder(mean + torch.randn_like(mean) * deviation.exp())


def _slots(model: Any, x: Tensor) -> Any:
    slots = model.mean + model.deviation.exp() * torch.randn(len(x), 2, 4, dtype=x.dtype)
    weights = (model.key(x) @ slots.mT).softmax(-1)
    return weights.mT @ model.value(x)


def _fixed_point(model: Any, x: Tensor) -> Any:
    z = x.new_zeros(len(x), 3)
    with torch.no_grad():
        for _ in range(20):
            z = torch.tanh(model.outer(x) + 0.1 * model.inner(z))
    return torch.tanh(model.outer(x) + 0.1 * model.inner(z))


def _differential_equation(model: Any, x: Tensor) -> Any:
    for _ in range(3):
        x = x + 0.1 * model.field(torch.cat([x, x.new_full((len(x), 1), 0.5)], 1)).tanh()
    return x


CASES = (
    Case("Conditional random field", lambda: Net(_conditional_random_field, transitions=parameter(3, 3)), reals(4, 3)),
    Case("Vector quantisation", lambda: Net(_vector_quantised, code=parameter(5, 4)), reals(3, 4)),
    Case(
        "Autoregressive density",
        lambda: Net(_autoregressive, start=parameter(3), out=parameter(4, 3), bias=parameter(4), into=parameter(3, 4)),
        reals(4),
    ),
    Case(
        "Masked autoregression",
        lambda: Net(lambda m, x: F.linear(x, m.inner.weight.tril(-1), m.inner.bias), inner=nn.Linear(4, 4)),
        reals(4),
    ),
    Case("Coupling layer of a flow", lambda: Net(_coupling, network=nn.Linear(2, 4)), reals(4)),
    Case("Invertible convolution of a flow", lambda: Net(_invertible_convolution, matrix=parameter(3, 3)), reals(3, 4)),
    Case(
        "Variational autoencoder", lambda: Net(_variational, encoder=nn.Linear(4, 6), decoder=nn.Linear(3, 4)), reals(4)
    ),
    Case(
        "Slots",
        lambda: Net(
            _slots, mean=parameter(1, 1, 4), deviation=parameter(1, 1, 4), key=nn.Linear(4, 4), value=nn.Linear(4, 4)
        ),
        reals(5, 4),
    ),
    Case("Fixed point", lambda: Net(_fixed_point, outer=nn.Linear(4, 3), inner=nn.Linear(3, 3)), reals(4)),
    Case("Differential equation", lambda: Net(_differential_equation, field=nn.Linear(5, 4)), reals(4)),
)
