"""`Case`: a named model of the zoo, in a few lines, and the helpers that write it down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from persample.sources.splits.tree import map_tensors, tensors_in
from persample.testing.devices import set_seed
from persample.testing.problem import Problem
from persample.testing.truth import call, unwrapped

#: Makes the inputs of a batch of the given size.
Inputs = Callable[[int], Any]


@dataclass(frozen=True)
class Case:
    """A model and the inputs that it takes.

    Attributes:
        name: unique in the zoo.
        model: makes the model.
        inputs: makes the inputs of a batch of the given size.
        dtype: of parameters and inputs.
        autocast: the dtype of `torch.autocast` around the call, or None.
        impossible: whether the gradients of single samples do not exist, so that every backend must refuse.
    """

    name: str
    model: Callable[[], nn.Module]
    inputs: Inputs
    dtype: torch.dtype = torch.float64
    autocast: torch.dtype | None = None
    impossible: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """Batches of one sample, of three, and of as many as the next dimension of the inputs is long."""
        if self.impossible:
            return (3,)
        first, *_ = tensors_in(self.inputs(1))
        return tuple(sorted({1, 3, *first.shape[1:2]}))

    def problem(self, size: int) -> Problem:
        """Return the case with a batch of `size` samples; the same numbers every time."""
        with torch.random.fork_rng():
            set_seed(size)
            model = self.model().to(self.dtype)
            for parameter in model.parameters():
                # Away from the ones and zeros of initialisation, at which some errors vanish.
                parameter.data += 0.3 * torch.randn_like(parameter)
            inputs = map_tensors(self._converted, self.inputs(size))
            with torch.no_grad():
                outputs = call(model, unwrapped(inputs))
            targets = torch.randn(outputs.shape, dtype=self.dtype)
        loss_fn = robust if self.autocast is None else weighted_sum
        return Problem(model, inputs, targets, loss_fn, autocast=self.autocast, impossible=self.impossible)

    def _converted(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


def robust(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that mixes all outputs of a sample, and takes all shapes."""
    return torch.log1p((outputs.flatten(1).sin() * targets.flatten(1)).sum(1).square())


def weighted_sum(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss whose own gradient is exact in any precision."""
    return (outputs.float().flatten(1) * targets.flatten(1)).sum(1)


def reals(*shape: int) -> Inputs:
    """Inputs of normally distributed numbers; `shape` is that of one sample."""
    return lambda size: torch.randn(size, *shape, dtype=torch.float64)


def tokens(*shape: int, vocabulary: int = 6) -> Inputs:
    """Inputs of indices below `vocabulary`; `shape` is that of one sample."""
    return lambda size: torch.randint(vocabulary, (size, *shape))


def both(*inputs: Inputs) -> Inputs:
    """Several positional arguments."""
    return lambda size: tuple(make(size) for make in inputs)


class Net(nn.Module):
    """A model in one line: its parts by name, and a function of them and of the inputs.

    Args:
        function: `function(model, *inputs)` is the forward pass.
        **parts: modules, parameters and buffers (plain tensors).
    """

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the function of the inputs."""
        return self.function(self, *args, **kwargs)


def parameter(*shape: int) -> nn.Parameter:
    """A parameter of normally distributed numbers."""
    return nn.Parameter(torch.randn(shape))


def tie(model: nn.Module, **names: str) -> nn.Module:
    """Return `model` with parameters put in place of others: `tie(model, **{"1.weight": "0.weight"})`."""
    for name, source in names.items():
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, model.get_parameter(source))
    return model


def frozen(module: nn.Module, *names: str) -> nn.Module:
    """Return `module` with the parameters of these names frozen, or all of them."""
    for parameter in map(module.get_parameter, names) if names else module.parameters():
        parameter.requires_grad_(False)
    return module
