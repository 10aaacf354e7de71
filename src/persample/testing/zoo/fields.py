"""Small models as people of many fields write them, with parameters in unusual places."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persample.testing.zoo.case import Case, Net, both, parameter, reals, tokens


def _convolution_of_each_sample(model: Any, x: Tensor) -> Any:
    """A mixture of kernels for each sample, as one convolution with a group for each of them."""
    size, channels, *image = x.shape
    mixture = model.route(x.mean((2, 3))).softmax(-1)
    kernels = (mixture @ model.kernels.flatten(1)).view(-1, channels, 3, 3)
    return F.conv2d(x.reshape(1, -1, *image), kernels, groups=size, padding=1).view(size, -1, *image)


def _spatial_transformer(model: Any, x: Tensor) -> Any:
    turn = 0.1 * model.turn(x.flatten(1)).view(-1, 2, 3) + torch.eye(2, 3, dtype=x.dtype)
    grid = F.affine_grid(turn, list(x.shape), align_corners=False)
    return model.conv(F.grid_sample(x, grid, align_corners=False))


def _fourier_operator(model: Any, x: Tensor) -> Any:
    spectrum = torch.einsum("bif,iof->bof", torch.fft.rfft(x), torch.view_as_complex(model.weight))
    return torch.fft.irfft(spectrum, n=x.shape[-1])


def _rotary(model: Any, x: Tensor) -> Any:
    angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.5], dtype=x.dtype)
    turned = torch.view_as_complex(model.inner(x).unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
    return model.outer(torch.view_as_real(turned).flatten(-2))


def _experts(model: Any, x: Tensor) -> Any:
    """Each token goes to one of two experts."""
    weight, choice = model.gate(x).softmax(-1).max(-1)
    output = torch.zeros_like(x)
    for number, expert in enumerate(model.experts):
        chosen = choice == number
        output[chosen] = expert(x[chosen]) * weight[chosen].unsqueeze(-1)
    return output


def _graph_network(model: Any, x: Tensor) -> Any:
    source, target = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([1, 2, 0, 2, 0])
    messages = model.message(torch.cat([x[:, source], x[:, target]], -1)).relu()
    return model.update(x.new_zeros(len(x), 3, 4).index_add(1, target, messages))


def _moving_average(model: Any, x: Tensor) -> Any:
    decay, state, states = model.decay.sigmoid(), torch.zeros_like(x[:, 0]), []
    for step in x.unbind(1):
        state = decay * state + (1 - decay) * step
        states.append(state)
    return torch.stack(states, 1)


def _state_space(model: Any, x: Tensor) -> Any:
    """A long convolution by Fourier transforms, with a kernel of exponentials."""
    length = x.shape[1]
    kernel = (-F.softplus(model.rate) * torch.arange(length, dtype=x.dtype)[:, None]).exp()
    product = torch.fft.rfft(kernel, n=2 * length, dim=0) * torch.fft.rfft(x, n=2 * length, dim=1)
    return torch.fft.irfft(product, n=2 * length, dim=1)[:, :length]


def _splines(model: Any, x: Tensor) -> Any:
    bumps = (-(x.unsqueeze(-1) - model.grid).square()).exp()
    return torch.einsum("bif,iof->bo", bumps, model.heights)


def _weights_from_a_network(model: Any, x: Tensor) -> Any:
    weights = model.network(x.mean(1)).view(-1, 2, 4)
    return torch.einsum("boi,bti->bto", weights, x)


def _lstm_by_hand(model: Any, x: Tensor) -> Any:
    h = c = x.new_zeros(len(x), 3)
    for step in x.unbind(1):
        i, f, g, o = (F.linear(step, model.input, model.bias) + F.linear(h, model.state)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return h


def _relative_positions(model: Any, x: Tensor) -> Any:
    distance = torch.arange(5)[:, None] - torch.arange(5) + 4
    return (torch.einsum("btd,tsd->bts", x, model.table[distance]) + x @ x.mT).softmax(-1) @ x


def _shifted_windows(model: Any, x: Tensor) -> Any:
    windows = x.roll((1, 1), (1, 2)).view(-1, 2, 2, 2, 2, 2).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 2)
    h = model.inner(windows)
    h = (h @ h.mT + model.bias).softmax(-1) @ h
    return h.view(-1, 2, 2, 2, 2, 2).permute(0, 1, 3, 2, 4, 5).reshape(x.shape)


def _perceiver(model: Any, x: Tensor) -> Any:
    latents = model.latents.repeat(len(x), 1, 1)
    return F.scaled_dot_product_attention(model.query(latents), model.key(x), model.value(x))


def _folded_heads(model: Any, x: Tensor) -> Any:
    q, k = (t.unflatten(-1, (2, -1)).transpose(1, 2).flatten(0, 1) for t in (model.query(x), model.key(x)))
    slopes = model.slopes[:, None, None].repeat(len(x), 1, 1) * torch.arange(x.shape[1], dtype=x.dtype)
    return torch.baddbmm(slopes, q, k.mT).view(len(x), -1)


def _members_in_the_batch(model: Any, x: Tensor) -> Any:
    """An ensemble whose members go through the layer as further samples."""
    members = model.inner(x.repeat(3, 1)).view(3, len(x), -1)
    return (members * model.scales).mean(0)


def _masked_tokens(model: Any, x: Tensor) -> Any:
    return model.out(torch.where((x == 2).unsqueeze(-1), model.mask, model.table(x)))


def _changed_in_place(model: Any, x: Tensor) -> Any:
    h = model.inner(x)
    h *= model.scale
    h += model.shift
    return h.sub_(model.shift.sin())


def _one_after_the_other(model: Any, x: Tensor) -> Any:
    return torch.stack([model.outer(model.inner(sample).tanh()) for sample in x])


def _by_value(model: Any, x: Tensor) -> Any:
    return torch.cat([model.first(s) if s.sum() > 0 else model.second(s) for s in x.split(1)])


CASES = (
    Case(
        "Convolution of each sample",
        lambda: Net(_convolution_of_each_sample, route=nn.Linear(2, 2), kernels=parameter(2, 3, 2, 3, 3)),
        reals(2, 4, 4),
    ),
    Case(
        "Spatial transformer",
        lambda: Net(_spatial_transformer, turn=nn.Linear(32, 6), conv=nn.Conv2d(2, 2, 2)),
        reals(2, 4, 4),
    ),
    Case("Fourier operator", lambda: Net(_fourier_operator, weight=parameter(2, 3, 4, 2)), reals(2, 6)),
    Case("Rotary positions", lambda: Net(_rotary, inner=nn.Linear(4, 4), outer=nn.Linear(4, 2)), reals(5, 4)),
    Case(
        "Mixture of experts",
        lambda: Net(_experts, gate=nn.Linear(4, 2), experts=nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])),
        reals(5, 4),
    ),
    Case("Graph network", lambda: Net(_graph_network, message=nn.Linear(8, 4), update=nn.Linear(4, 2)), reals(3, 4)),
    Case("Moving average", lambda: Net(_moving_average, decay=parameter(4)), reals(5, 4)),
    Case("State space", lambda: Net(_state_space, rate=parameter(4)), reals(5, 4)),
    Case("Splines", lambda: Net(_splines, grid=parameter(3), heights=parameter(4, 2, 3)), reals(4)),
    Case("Weights from a network", lambda: Net(_weights_from_a_network, network=nn.Linear(4, 8)), reals(5, 4)),
    Case(
        "Polynomial",
        lambda: Net(lambda m, x: sum(c * x**k for k, c in enumerate(m.coefficients)), coefficients=parameter(3)),
        reals(4),
    ),
    Case(
        "LSTM by hand",
        lambda: Net(_lstm_by_hand, input=parameter(12, 4), bias=parameter(12), state=parameter(12, 3)),
        reals(5, 4),
    ),
    Case(
        "Maximum over points",
        lambda: Net(lambda m, x: m.outer(m.inner(x).amax(1)), inner=nn.Linear(3, 4), outer=nn.Linear(4, 2)),
        reals(5, 3),
    ),
    Case(
        "Memory of keys and values",
        lambda: Net(lambda m, x: (x @ m.keys.T).softmax(-1) @ m.values, keys=parameter(5, 4), values=parameter(5, 3)),
        reals(4),
    ),
    Case(
        "Bilinear attention",
        lambda: Net(
            lambda m, q, k: torch.einsum("bqd,de,bke->bqk", q, m.form, k).softmax(-1) @ k, form=parameter(4, 4)
        ),
        both(reals(3, 4), reals(5, 4)),
    ),
    Case("Relative positions", lambda: Net(_relative_positions, table=parameter(9, 4)), reals(5, 4)),
    Case("Shifted windows", lambda: Net(_shifted_windows, inner=nn.Linear(2, 2), bias=parameter(4, 4)), reals(4, 4, 2)),
    Case(
        "Perceiver",
        lambda: Net(
            _perceiver, latents=parameter(1, 2, 4), query=nn.Linear(4, 4), key=nn.Linear(4, 4), value=nn.Linear(4, 4)
        ),
        reals(5, 4),
    ),
    Case(
        "Folded heads with slopes",
        lambda: Net(_folded_heads, slopes=parameter(2), query=nn.Linear(4, 4), key=nn.Linear(4, 4)),
        reals(5, 4),
    ),
    Case(
        "Prompt of learned vectors",
        lambda: Net(
            lambda m, x: m.out(torch.cat([m.prompt.unsqueeze(0).expand(len(x), -1, -1), m.table(x)], 1)),
            prompt=parameter(2, 3),
            table=nn.Embedding(6, 3),
            out=nn.Linear(3, 2),
        ),
        tokens(4),
    ),
    Case(
        "Masked tokens",
        lambda: Net(_masked_tokens, table=nn.Embedding(6, 3), mask=parameter(3), out=nn.Linear(3, 6)),
        tokens(4),
    ),
    Case(
        "Ensemble in the batch",
        lambda: Net(_members_in_the_batch, inner=nn.Linear(4, 3), scales=parameter(3, 1, 3)),
        reals(4),
    ),
    Case(
        "Mixture of operations",
        lambda: Net(
            lambda m, x: sum(a * layer(x) for a, layer in zip(m.mixture.softmax(0), m.layers, strict=True)),
            mixture=parameter(2),
            layers=nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)]),
        ),
        reals(4),
    ),
    Case(
        "Parameters that change samples in place",
        lambda: Net(_changed_in_place, inner=nn.Linear(4, 3), scale=parameter(3), shift=parameter(3)),
        reals(4),
    ),
    Case(
        "One sample after the other",
        lambda: Net(_one_after_the_other, inner=nn.Linear(4, 3), outer=nn.Linear(3, 2)),
        reals(4),
    ),
    Case("Layer chosen by value", lambda: Net(_by_value, first=nn.Linear(4, 3), second=nn.Linear(4, 3)), reals(4)),
    Case("Clamped by a parameter", lambda: Net(lambda m, x: x.clamp(max=m.bound), bound=parameter(4)), reals(4)),
    Case(
        "Weight penalty in the output",
        lambda: Net(lambda m, x: m.inner(x) + m.inner.weight.square().sum(), inner=nn.Linear(4, 3)),
        reals(4),
    ),
)
