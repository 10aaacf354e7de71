"""Modules that raise: exceptions from inside a model must pass on, and leave everything as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class BlownUpError(Exception):
    """An error that no library knows."""


class Bomb(nn.Module):
    """Raises in its n-th call, and passes its input on before that."""

    def __init__(self, make_error: Callable[[], Exception] = BlownUpError, calls_before: int = 0) -> None:
        super().__init__()
        self.make_error = make_error
        self.calls_left = [calls_before]  # a list, so that it is no attribute that a call may not change

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`, or raise."""
        self.calls_left[0] -= 1
        if self.calls_left[0] < 0:
            raise self.make_error()
        return x


class _BackwardBomb(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise BlownUpError


class BackwardBomb(nn.Module):
    """Raises in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`."""
        output: Tensor = _BackwardBomb.apply(x)  # type: ignore[no-untyped-call]
        return output
