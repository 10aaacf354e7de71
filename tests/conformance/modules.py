"""Modules that are no layers of PyTorch: the ways in which a model uses its layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class InTurn(nn.Module):
    """f(f(x)): one module in two places of a chain."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.tanh(self.inner(x)))


class SideBySide(nn.Module):
    """f(x) + f(sin x + 0.3): one module in two branches."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.inner(x.sin() + 0.3)


class Permute(nn.Module):
    """Another order of the dimensions after the sample's."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, *(1 + d for d in self.order))


class TimeFirst(nn.Module):
    """Applies a layer with dims 0 and 1 exchanged, as many sequence models do inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


class Folded(nn.Module):
    """Applies a layer with the positions folded into dim 0."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class BareScale(nn.Module):
    """A parameter that belongs to no layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class ScaledLinear(nn.Linear):
    """A subclass of a known layer that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x.tanh())


class ByMethod(nn.Module):
    """Calls `inner.forward`, past the hooks."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner.forward(x)
        return output


class TiedToEmbedding(nn.Module):
    """Embedding in, the same table out: `F.linear(h, embedding.weight)`, as in language models."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.embedding(tokens)), self.embedding.weight)


class FirstOutput(nn.Module):
    """The first output of a layer that has several, like attention and recurrent layers."""

    def __init__(self, inner: nn.Module, **options: Any) -> None:
        super().__init__()
        self.inner = inner
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(x, **self.options)[0]
        return output


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return output


class Model(nn.Module):
    """A chain, with a second input that is added to the result, and a layer that nothing uses."""

    def __init__(self, chain: nn.Module, unused: nn.Module | None = None) -> None:
        super().__init__()
        self.chain = chain
        self.unused = unused

    def forward(self, x: Tensor, shift: Tensor | None = None, *, negate: bool = False) -> Tensor:
        output: Tensor = self.chain(x)
        if shift is not None:
            output = output + shift
        return -output if negate else output


class Bomb(nn.Module):
    """Raises in its n-th call, and passes its input on before that."""

    def __init__(self, make_error: Callable[[], Exception], calls_before: int = 0) -> None:
        super().__init__()
        self.make_error = make_error
        self.calls_left = [calls_before]

    def forward(self, x: Tensor) -> Tensor:
        if self.calls_left[0] == 0:
            raise self.make_error()
        self.calls_left[0] -= 1
        return x
