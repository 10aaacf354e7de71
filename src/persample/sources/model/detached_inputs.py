"""Passing the user's tensors to the model detached, but differentiable where they were."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def entering(function: Callable[[Tensor], Tensor] = Tensor.detach) -> Callable[[Tensor], Tensor]:
    """Return what a batch holds in place of tensors, by `function`.

    A model or a loss may differentiate by its inputs. So the result is detached, but requires a gradient where the
    tensor does. The result for a leaf is a leaf, that for another tensor is none.

    Args:
        function: what is made of each tensor: its rows, its values in float64.
    """

    def enter(tensor: Tensor) -> Tensor:
        values = function(tensor).detach()
        if not tensor.requires_grad:
            return values
        leaf = values.requires_grad_()
        with torch.enable_grad():
            return leaf if tensor.is_leaf else leaf.view_as(leaf)

    return once(enter)


def changeable() -> Callable[[Tensor], Tensor]:
    """Return the function that gives a model its tensors: leaves themselves, copies of the rest.

    A model may change such a tensor in place, in each call anew.
    """
    return once(lambda tensor: tensor if tensor.is_leaf else tensor.clone())


def once(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Memoise `function` by tensor, so that a tensor used twice (input and target) stays one object."""
    found: dict[int, Tensor] = {}

    def of(tensor: Tensor) -> Tensor:
        if id(tensor) not in found:
            found[id(tensor)] = function(tensor)
        return found[id(tensor)]

    return of
