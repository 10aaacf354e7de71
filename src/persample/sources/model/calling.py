"""Calling models and losses, with errors for arguments that they do not take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from persample.errors import BatchError, LossError, UnsupportedModelError, UsageError
from persample.losses import PerSampleLoss, advice_to_take_out, require_losses, tensors_by_name
from persample.sources.model.modules import modules_of


def called(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call the model.

    Raises:
        BatchError: it does not take them.
        UsageError: it has no forward method.
    """
    try:
        with forward_exists():
            return model(*args, **kwargs)
    except TypeError as error:
        whole = len(args) == 1 and not kwargs and not isinstance(args[0], Tensor)
        if fits(model, args, kwargs) and not whole:
            raise
        given = f"its only argument, of type {type(args[0]).__name__}" if whole else "the inputs"
        apart = _misfit(model, (), args[0]) if whole and isinstance(args[0], Mapping) else None
        apart = f", nor with its entries ({apart})" if apart else ""
        raise BatchError(
            f"The model cannot be called with {given} ({error}){apart}: a tuple is passed as positional arguments, a "
            "dict as keyword arguments; (it,) passes a tuple, a dict or an object whole."
        ) from error


@contextmanager
def forward_exists() -> Iterator[None]:
    """Say what to do where a module without a forward method is called.

    Raises:
        UsageError: one was.
    """
    try:
        yield
    except NotImplementedError as error:
        if 'missing the required "forward"' not in str(error):
            raise
        raise UsageError(
            f"{error}: pass the module that your code calls. If training_step() of a LightningModule calls self.net, "
            "that is VOGN(self.net, ...) in place of VOGN(self, ...)."
        ) from error


def fits(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether `forward` takes these arguments, by number and names; also where its signature does not tell."""
    return _misfit(model, args, kwargs) is None


def _misfit(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Why `forward` does not take these arguments; None if it does, or if its signature does not tell."""
    if getattr(model, "_forward_pre_hooks", None):  # may change them
        return None
    try:
        signature = _signature(getattr(model, "forward", model))
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    return None


@lru_cache(maxsize=128)
def _signature_of_method(function: Any) -> inspect.Signature:
    signature = inspect.signature(function)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _signature(call: Callable[..., Any]) -> inspect.Signature:
    function = getattr(call, "__func__", None)
    return inspect.signature(call) if function is None else _signature_of_method(function)


def losses_of(loss_fn: PerSampleLoss, outputs: Any, targets: Any, batch_size: int) -> Tensor:
    """Return the losses of the samples, checked by `require_losses`.

    Raises:
        LossError: they are no vector of length `batch_size`, or `loss_fn` does not take what the model returned.
    """
    try:
        losses = loss_fn(outputs, targets)
    except (TypeError, AttributeError) as error:
        if isinstance(outputs, Tensor) and (targets is None or isinstance(targets, Tensor)):
            raise
        advice = "" if isinstance(outputs, Tensor) else f" {advice_to_take_out(outputs)}"
        raise LossError(
            f"loss_fn failed on outputs of type {type(outputs).__name__} and targets of type "
            f"{type(targets).__name__} ({type(error).__name__}: {str(error).rstrip('.')}).{advice}"
        ) from error
    if isinstance(losses, Tensor) and losses.dim() == 0 and losses is tensors_by_name(outputs).get("loss"):
        raise LossError(
            "loss_fn returned a scalar, the loss that the model itself computed, which is a mean over the batch: leave "
            "the labels out of the inputs, pass them as targets, and compute the loss of each sample from the other "
            "outputs: lambda outputs, targets: F.cross_entropy(outputs.logits, targets, reduction='none')."
        )
    return require_losses(losses, batch_size)


def refuse_backward_in_forward(model: nn.Module) -> None:
    """Raise if the forward pass that just ended gave a trained parameter a gradient."""
    with torch._C.DisableTorchFunction():  # a mode that watches operations would see a look at each gradient
        for module, path in modules_of(model).items():
            for name, p in module._parameters.items():
                if p is not None and p.requires_grad and p.grad is not None:
                    raise UnsupportedModelError(
                        "The model or the loss calls .backward() in the forward pass, which adds to the gradient of "
                        f"parameter {f'{path}.{name}'.lstrip('.')!r}: use torch.autograd.grad there, or pass inputs= "
                        "to .backward()."
                    )
