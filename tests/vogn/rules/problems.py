"""Small problems whose gradients are written by hand in NumPy, to compare optimizers with transcriptions of rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from persample import losses
from persample.testing.devices import generator_of

Array = NDArray[np.float64]
Batch = tuple[Array, Any]
Noise = Callable[[], list[Array]]


def softmax_regression(w: list[Array], x: Array, y: Array) -> list[Array]:
    """g_i for −log softmax(W x + b)[y]: δ = softmax − one-hot."""
    weight, bias = w
    logits = x @ weight.T + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    delta = p / p.sum(1, keepdims=True) - np.eye(len(bias))[y]
    return [delta[:, :, None] * x[:, None, :], delta]


def linear_regression(w: list[Array], x: Array, y: Array) -> list[Array]:
    """g_i for ½ ‖y − W x − b‖² + constant."""
    weight, bias = w
    delta = x @ weight.T + bias - y
    return [delta[:, :, None] * x[:, None, :], delta]


def tanh_network(w: list[Array], x: Array, y: Array) -> list[Array]:
    """g_i for ½ ‖y − W₂ tanh(W₁ x + b₁) − b₂‖² + constant."""
    w1, b1, w2, b2 = w
    h = np.tanh(x @ w1.T + b1)
    delta2 = h @ w2.T + b2 - y
    delta1 = (delta2 @ w2) * (1 - h**2)
    return [delta1[:, :, None] * x[:, None, :], delta1, delta2[:, :, None] * h[:, None, :], delta2]


@dataclass(frozen=True)
class Problem:
    """A model, its loss, and the gradients of single samples by hand."""

    make_model: Callable[[], nn.Module]
    loss_fn: Callable[..., Any]
    gradients: Callable[[list[Array], Array, Any], list[Array]]
    labels: bool

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return self.make_model().double()

    def batches(self, sizes: list[list[int]], seed: int) -> list[list[Batch]]:
        """Random mini-batches; `sizes` has the sizes of the parts of each."""
        rng = np.random.default_rng(seed)
        linears = [m for m in self.make_model().modules() if isinstance(m, nn.Linear)]
        inputs, outputs = linears[0].in_features, linears[-1].out_features

        def batch(size: int) -> Batch:
            targets = rng.integers(0, outputs, size) if self.labels else rng.standard_normal((size, outputs))
            return rng.standard_normal((size, inputs)), targets

        return [[batch(size) for size in step] for step in sizes]


PROBLEMS = {
    "softmax regression": Problem(lambda: nn.Linear(3, 4), losses.cross_entropy, softmax_regression, labels=True),
    "linear regression": Problem(lambda: nn.Linear(2, 2), losses.gaussian, linear_regression, labels=False),
    "tanh network": Problem(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), losses.gaussian, tanh_network, labels=False
    ),
}


def weights_of(model: nn.Module) -> list[Array]:
    return [p.detach().numpy(force=True).copy() for p in model.parameters()]


def shared_noise(model: nn.Module, seed: int) -> Noise:
    """The noise that an optimizer with a generator of this seed draws, draw after draw."""
    generator = generator_of(seed)
    shapes = [p.shape for p in model.parameters()]

    def draw() -> list[Array]:
        sizes = [shape.numel() for shape in shapes]
        vector = torch.randn(sum(sizes), generator=generator, dtype=torch.float64)
        return [piece.view(shape).numpy(force=True) for piece, shape in zip(vector.split(sizes), shapes, strict=True)]

    return draw


def as_tensors(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.as_tensor(batch[0]), torch.as_tensor(batch[1])
