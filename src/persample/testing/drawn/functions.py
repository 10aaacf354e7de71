"""Functions of tensors as modules that say in their `repr` what they do, and layers with functions around them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Function(nn.Module):
    """A function of tensors without parameters.

    Args:
        name: what a failing case shows.
        function: the function.
    """

    def __init__(self, name: str, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.name = name
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        """Return the function of `args`."""
        return self.function(*args)

    def extra_repr(self) -> str:
        """Return the name."""
        return self.name


class Around(nn.Module):
    """A function of tensors and of a layer, or of a parameter.

    Args:
        name: what a failing case shows.
        function: `function(part, *args)`.
        part: the layer or the parameter.
    """

    def __init__(self, name: str, function: Callable[..., Tensor], part: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.name = name
        self.function = function
        self.part = part

    def forward(self, *args: Tensor) -> Tensor:
        """Return the function of the part and `args`."""
        return self.function(self.part, *args)

    def extra_repr(self) -> str:
        """Return the name, and the shape of a bare parameter."""
        return self.name + (f", {tuple(self.part.shape)}" if isinstance(self.part, nn.Parameter) else "")
