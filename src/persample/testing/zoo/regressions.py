"""Models on which some backend was once wrong, refused without need, or took rounding for an error; kept by name."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from persample.testing.zoo.case import Case, Net, both, frozen, parameter, reals, tokens


def _sign_of_itself(model: Any, x: Tensor) -> Any:
    y: Tensor = model.inner(x.clone())
    return y * y.detach().sign()


def _sample_by_sample(model: Any, x: Tensor) -> Any:
    return torch.stack([torch.cat([model.inner(sample) * model.scale, model.token]).tanh() for sample in x])


def _scattered_nowhere(model: Any, x: Tensor) -> Any:
    """What is scattered has no entries, but a graph."""
    mask = x.abs() > 1e6
    scattered = torch.ones_like(x).masked_scatter(mask, x[mask] * model.scale)
    return F.linear(scattered, model.weight) * model.scale + F.linear(x, model.weight, model.bias)


def _checkpoint_in_checkpoint(model: Any, x: Tensor) -> Any:
    def inside(h: Tensor) -> Any:
        return F.linear(h, model.first.weight.tanh() @ torch.eye(4, dtype=h.dtype)).tanh()

    def outside(h: Tensor) -> Any:
        return model.second(checkpoint(inside, h, use_reentrant=False) * model.first.bias)

    return checkpoint(outside, model.first(x), use_reentrant=False)


def _experts_by_size(model: Any, x: Tensor) -> Any:
    """The experts of large numbers get no tokens."""
    output = model.gate(x)
    for number in range(4):
        chosen = (x[..., 0].abs() // 0.7 + 2 * (number == 3)) == number
        output = output.masked_scatter(
            chosen.unsqueeze(-1), (x[chosen] * model.scale[number]).tanh() + model.shift[number]
        )
    return output


class _Sign(torch.autograd.Function):
    """The sign, whose gradient goes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> Any:
        return deltas[0]


def _sign(x: Tensor) -> Any:
    return _Sign.apply(x)  # type: ignore[no-untyped-call]


def _nothing_chosen(model: Any, x: Tensor) -> Any:
    chosen = x > 1e3
    return model.inner(torch.zeros_like(x).masked_scatter(chosen, x[chosen] * model.scale)) + x


def _chosen_tokens(model: Any, x: Tensor) -> Any:
    chosen = x[..., 0] > 0
    return x.index_put((chosen,), torch.einsum("nd,df->nf", x[chosen], model.matrix).tanh())


def _samples_as_groups(model: Any, x: Tensor) -> Any:
    size, _, *image = x.shape
    weight, bias = model.weight.repeat(size, 1, 1, 1), model.bias.repeat(size)
    return F.conv2d(x.reshape(1, -1, *image), weight, bias, groups=size).unflatten(1, (size, -1)).squeeze(0)


def _hooked_weight(model: Any, x: Tensor) -> Any:
    weight = model.weight.t()
    if weight.requires_grad:
        weight.register_hook(lambda gradient: 3 * gradient)
    return F.linear(x, weight)


CASES = (
    # The self-check took rounding for an error where every gradient vanishes in exact arithmetic.
    Case(
        "Vanishing gradients before a norm of one number",
        lambda: nn.Sequential(nn.Linear(2, 1), frozen(nn.LayerNorm(1, eps=0.1))),
        reals(2),
    ),
    # What rounding leaves grows with 1/√ε, and says nothing of the loss.
    Case(
        "Vanishing gradients before a norm of one number with a small ε",
        lambda: nn.Sequential(nn.Linear(2, 3), nn.Unflatten(1, (3, 1)), frozen(nn.LayerNorm(1, eps=1e-12))),
        reals(2),
    ),
    Case(
        "Vanishing gradients before a norm of one number in float32",
        lambda: nn.Sequential(nn.Linear(2, 3), nn.Unflatten(1, (3, 1)), frozen(nn.LayerNorm(1))),
        reals(2),
        dtype=torch.float32,
    ),
    Case(
        "Vanishing loss behind a norm of one number",
        lambda: nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 1), nn.LayerNorm(1, bias=False)),
        reals(2),
    ),
    Case("Vanishing loss of a norm of one number", lambda: nn.LayerNorm(1, bias=False), reals(1)),
    Case(
        "Vanishing gradients by cancellation",
        lambda: Net(lambda m, x: m.inner(x) + m.inner(-x), inner=nn.Linear(2, 3, bias=False)),
        reals(2),
    ),
    Case(
        "Vanishing gradients of a normalised weight",
        lambda: frozen(parametrizations.weight_norm(nn.Linear(1, 3)), "bias", "parametrizations.weight.original0"),
        reals(1),
    ),
    # The only layer of the model is not called as a module, so that no call was recorded and zeros came out.
    Case(
        "No layer is called as a module",
        lambda: Net(lambda m, x: torch.addmm(m.inner.bias, x, m.inner.weight.mT), inner=nn.Linear(2, 3)),
        reals(2),
    ),
    Case("Sign of itself", lambda: Net(_sign_of_itself, inner=nn.Linear(4, 4)), reals(4)),
    Case(
        "Sample by sample in a loop",
        lambda: Net(_sample_by_sample, inner=nn.Linear(3, 2), scale=parameter(2), token=parameter(2)),
        reals(3),
    ),
    Case(
        "Activation checkpointing inside activation checkpointing",
        lambda: Net(_checkpoint_in_checkpoint, first=nn.Linear(4, 4), second=nn.Linear(4, 4)),
        reals(3, 4),
    ),
    # Gradients of complex products take conjugates.
    Case(
        "Complex linear layer of two real parameters",
        lambda: Net(
            lambda m, x: torch.view_as_real(torch.fft.rfft(x) @ torch.complex(m.real, m.imaginary)).flatten(1),
            real=parameter(4, 3),
            imaginary=parameter(4, 3),
        ),
        reals(2, 6),
    ),
    Case(
        "Complex convolution of one real parameter",
        lambda: Net(
            lambda m, x: F.conv1d(torch.complex(x, x.sin()), torch.view_as_complex(m.weight)).abs() * m.scale,
            weight=parameter(3, 2, 2, 2),
            scale=parameter(),
        ),
        reals(2, 5),
    ),
    # Refused without need.
    Case(
        "Experts that nobody chooses",
        lambda: Net(_experts_by_size, gate=nn.Linear(4, 4), scale=parameter(4, 4), shift=parameter(4, 4)),
        reals(2, 4),
    ),
    Case(
        "Convolution of one image after the other",
        lambda: Net(lambda m, x: torch.stack([m.inner(image) for image in x]), inner=nn.Conv2d(2, 3, 2)),
        reals(2, 4, 4),
    ),
    Case(
        "Constants looked up by the numbers of the samples",
        lambda: Net(
            lambda m, x: m.inner(torch.cat([m.table[x], m.table.T[:, x].movedim(0, -1).sin()], -1)),
            inner=nn.Linear(8, 3),
            table=torch.randn(6, 4),
        ),
        tokens(3),
    ),
    Case(
        "Noise of the level that each sample is given",
        lambda: Net(
            lambda m, x, t: m.outer(m.inner(m.levels[t, 0, None] * x + m.levels.gather(0, t[:, None].expand(-1, 2)))),
            inner=nn.Linear(2, 3),
            outer=nn.Linear(3, 2),
            levels=torch.randn(6, 2),
        ),
        both(reals(2), tokens()),
    ),
    Case(
        "ReLU in place where no sample entered",
        lambda: Net(_nothing_chosen, inner=nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)), scale=parameter()),
        reals(3),
    ),
    Case(
        "ReLU in place on a tensor made of parameters",
        lambda: Net(lambda m, x: F.linear(x, F.relu(2 * m.weight, inplace=True)), weight=parameter(4, 3)),
        reals(3),
    ),
    Case("Linear layer of no inputs", lambda: Net(lambda m, x: m.inner(x[:, :0]) * x, inner=nn.Linear(0, 3)), reals(3)),
    Case(
        "Linear layer of no outputs",
        lambda: Net(lambda m, x: m.outer(torch.cat([m.inner(x), x], 1)), inner=nn.Linear(3, 0), outer=nn.Linear(3, 2)),
        reals(3),
    ),
    Case(
        "Custom function of a weight", lambda: Net(lambda m, x: x @ _sign(m.weight), weight=parameter(3, 2)), reals(3)
    ),
    # Without a check, it gave zeros for the parameter.
    Case(
        "Custom function of a tensor made of parameters",
        lambda: Net(lambda m, x: x @ _sign(m.weight - m.weight.mean()), weight=parameter(3, 2)),
        reals(3),
    ),
    # Entries of nobody stand between those of a sample, and in two batches of two could stand between the samples.
    Case(
        "Linear layer on the gaps of a transposed convolution",
        lambda: nn.Sequential(frozen(nn.ConvTranspose2d(2, 1, 1, stride=(2, 1))), nn.Linear(3, 2)),
        reals(2, 2, 3),
    ),
    Case(
        "Linear layer on the gaps of a transposed convolution of exchanged samples",
        lambda: Net(
            lambda m, x: m.outer(m.inner(x[torch.arange(len(x)).flip(0)])).flip(0),
            inner=frozen(nn.ConvTranspose2d(2, 1, 1, stride=(2, 1))),
            outer=nn.Linear(3, 2),
        ),
        reals(2, 2, 3),
    ),
    Case(
        "Linear layer on diagonal matrices",
        lambda: Net(lambda m, x: m.outer(torch.diag_embed(m.inner(x))), inner=nn.Linear(2, 2), outer=nn.Linear(2, 3)),
        reals(2),
    ),
    Case(
        "LSTM on one sequence after the other",
        lambda: Net(lambda m, x: torch.stack([m.inner(row)[0] for row in x]), inner=nn.LSTM(3, 2, bidirectional=True)),
        reals(4, 3),
    ),
    Case(
        "Rows of a parameter by torch.embedding",
        lambda: Net(lambda m, x: torch.embedding(m.table, x, 2), table=parameter(6, 3)),
        tokens(4),
    ),
    Case(
        "Entries of a parameter by gather",
        lambda: Net(
            lambda m, x: m.table.gather(0, x) * m.row.gather(0, x[:, 0]).unsqueeze(1),
            table=parameter(6, 3),
            row=parameter(6),
        ),
        tokens(3),
    ),
    Case(
        "Linear equations with a learned matrix",
        lambda: Net(
            lambda m, x: torch.linalg.solve(8 * torch.eye(4, dtype=x.dtype) + m.matrix, x.unsqueeze(-1)),
            matrix=parameter(4, 4),
        ),
        reals(4),
    ),
    Case(
        "Linear equations with matrices of the samples",
        lambda: Net(
            lambda m, x: torch.linalg.solve(
                8 * torch.eye(4, dtype=x.dtype) + x.unsqueeze(1) * x.unsqueeze(2), m.vector.expand(len(x), -1)
            ),
            vector=parameter(4),
        ),
        reals(4),
    ),
    # The gradients of two parameters were one tensor, which was squared in place for one of them.
    Case(
        "Weight that is a sum of two parameters",
        lambda: Net(
            lambda m, x: F.linear(x, m.weight + m.change.view(4, 3).t(), m.first + m.second),
            weight=parameter(3, 4),
            change=parameter(12),
            first=parameter(3),
            second=parameter(3),
        ),
        reals(4),
    ),
    # What the model saw of an expression did not require a gradient, so that hooks, branches and custom functions
    # lost the parameter.
    Case("Hook on a transposed weight", lambda: Net(_hooked_weight, weight=parameter(4, 3)), reals(4)),
    Case(
        "Branch on whether an expression requires a gradient",
        lambda: Net(
            lambda m, x: F.linear(x, 2 * m.weight) * (1 + (m.weight * 2).requires_grad),
            weight=parameter(3, 4),
        ),
        reals(4),
    ),
    Case(
        "Custom functions of custom functions",
        lambda: Net(lambda m, x: F.linear(x, _sign(_sign(m.weight * 2) + m.weight)), weight=parameter(3, 4)),
        reals(4),
    ),
    # Refused, or an error of PyTorch.
    Case(
        "Weight by a sparse product",
        lambda: Net(
            lambda m, x: F.linear(x, torch.sparse.mm(torch.eye(3, dtype=x.dtype).to_sparse(), m.weight)),
            weight=parameter(3, 4),
        ),
        reals(4),
    ),
    Case(
        "Product with a matrix without entries",
        lambda: Net(
            lambda m, x: x[..., :0] @ m.matrix + x[..., 1:] * m.scale, matrix=parameter(0, 3), scale=parameter(3)
        ),
        reals(2, 4),
    ),
    Case("Layer of one vector", lambda: Net(lambda m, x: F.linear(x, m.weight), weight=parameter(4)), reals(3, 4)),
    # More random numbers are drawn for some samples than for others.
    Case("RReLU in training mode", lambda: nn.Sequential(nn.Linear(4, 3), nn.RReLU()), reals(4)),
    # Picked rows were refused by operations without a rule.
    Case(
        "Tensor product of exchanged samples with a parameter",
        lambda: Net(
            lambda m, x: torch.einsum("bij,jk->bki", x[torch.arange(len(x)).flip(0)], m.matrix).flip(0),
            matrix=parameter(4, 2),
        ),
        reals(3, 4),
    ),
    Case(
        "Tensor product of chosen tokens",
        lambda: Net(_chosen_tokens, matrix=parameter(4, 4)),
        reals(3, 4),
    ),
    Case(
        "Convolution of all samples as the groups of one image",
        lambda: Net(_samples_as_groups, weight=parameter(3, 2, 2, 2), bias=parameter(3)),
        reals(2, 3, 4),
    ),
    Case(
        "Scattered under an empty mask",
        lambda: Net(_scattered_nowhere, weight=parameter(3, 4), bias=parameter(3), scale=parameter()),
        reals(4),
    ),
)
