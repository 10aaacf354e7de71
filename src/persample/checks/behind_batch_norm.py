"""Finding the children that a subclass of BatchNorm calls after its batch norm, as timm's BatchNormAct2d does."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from persample.checks.copies import copy_of

_SHAPES = ((3, 3), (), (3,), (3, 3, 3))
_BATCH_NORM = ""  # no child can have this name
_UNKNOWN = "?"


def children_behind(module: _BatchNorm) -> tuple[str, ...] | None:
    """Return the names of the children of `module` in the order of the calls on its output.

    Its forward is run on a small batch, on copies in training and in eval mode. It is known if the input goes to
    one batch norm with the parameters and statistics of the module, the result of that through each of the children
    once, and the last result out; nothing else may touch it on its way.

    Returns:
        The names, or None if the forward computes something else, or could not be run.
    """
    training, evaluation = (_steps(module, mode) for mode in (True, False))
    names = [name for name, child in module._modules.items() if child is not None]
    if training != evaluation or training[:1] != [_BATCH_NORM] or sorted(training[1:]) != sorted(names):
        return None
    return tuple(training[1:])


def without_hooks(module: nn.Module) -> nn.Module:
    """Remove all hooks from `module`, and return it."""
    vars(module).update(hooks_of(nn.Module()))
    return module


def hooks_of(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of `module` that hold its hooks."""
    return {name: value for name, value in vars(module).items() if "_hook" in name}


def _steps(module: _BatchNorm, training: bool) -> list[str]:
    """Return the steps that the input goes through, on a batch of the first shape that the forward takes."""
    for shape in _SHAPES:
        copied = copy_of(module)
        copied.training = training
        try:
            with torch.inference_mode(False), torch.enable_grad():
                return _Path(copied).follow(_batch(copied, shape))
        except Exception:  # noqa: BLE001 - the forward is the user's, and may take another shape
            continue
    return [_UNKNOWN]


def _batch(module: _BatchNorm, shape: Iterable[int]) -> Tensor:
    like = next((t for t in (module.weight, module.running_mean) if t is not None), torch.empty(0))
    size = (2, module.num_features, *shape)
    return torch.linspace(-1, 1, torch.Size(size).numel(), device=like.device).view(size).to(like.dtype)


class _Path(TorchFunctionMode):
    """Follows a tensor through a module's forward: between two steps it is the same, unchanged object."""

    def __init__(self, module: _BatchNorm) -> None:
        super().__init__()
        self.module = without_hooks(module)
        self.steps: list[str] = []
        for name, child in module.named_children():
            without_hooks(child)
            child.forward = partial(self._child, name)

    def follow(self, x: Tensor) -> list[str]:
        """Return the steps of `x`; the last is unknown if the result is not the output of the last step."""
        self._arrive(x)
        with self:
            output = self.module.forward(x)
        return self.steps if self._is_here(output) else [_UNKNOWN]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.batch_norm:
            given = inspect.signature(func).bind(*args, **(kwargs or {}))
            given.apply_defaults()
            known = self._is_here(given.arguments["input"]) and self._is_its_own(given.arguments)
            self._step(_BATCH_NORM if known else _UNKNOWN, result)
        return result

    def _is_its_own(self, given: dict[str, Any]) -> bool:
        """Whether a batch norm was called as the module's base class would call it."""
        module = self.module
        tensors = ("weight", "bias") if module.training else ("weight", "bias", "running_mean", "running_var")
        return (
            all(given[name] is getattr(module, name) for name in tensors)
            and given["training"] == (module.training or module.running_mean is None)
            and given["eps"] == module.eps
        )

    def _child(self, name: str, x: Tensor) -> Tensor:
        result = x.clone()
        self._step(name if self._is_here(x) else _UNKNOWN, result)
        return result

    def _step(self, name: str, result: Tensor) -> None:
        self.steps.append(name)
        self._arrive(result)

    def _arrive(self, x: Tensor) -> None:
        self._here, self._version = x, x._version

    def _is_here(self, x: Any) -> bool:
        return x is self._here and x._version == self._version and torch.is_grad_enabled()
