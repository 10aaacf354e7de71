"""The optimizer's loss: it must exist, and have no parameters of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._pytree import tree_leaves

from persample.errors import UsageError
from persample.losses import PerSampleLoss, as_per_sample
from persample.sources.model.autograd_graph import nodes_from, variables_of
from persample.warn import warn


class UntrainedLossWarning(UserWarning):
    """The loss has parameters of its own, which the optimizer does not train."""


def require_loss(loss_fn: Callable[[Any, Any], Any] | None, call: str) -> Callable[[Any, Any], Any]:
    """Return `loss_fn` if there is one.

    Raises:
        UsageError: there is none.
    """
    if loss_fn is None:
        raise UsageError(_NO_LOSS.format(call))
    return loss_fn


_NO_LOSS = (
    "{} needs a loss, but the optimizer was created without one: pass loss_fn, a function of (outputs, targets) that "
    "returns the loss of each sample, for example persample.losses.cross_entropy. Or run forward and backward "
    "yourself, inside `with optimizer.sampled_params(train=True):`."
)


def loss_of(loss_fn: Callable[[Any, Any], Any] | None, model: nn.Module) -> PerSampleLoss:
    """Return the per-sample loss; its first call inspects the graph.

    Args:
        loss_fn: what the user gave, None if nothing.
        model: the network.

    Raises:
        LossError: `loss_fn` is not callable.
    """
    if loss_fn is None:

        def no_loss(outputs: Any, targets: Any) -> Tensor:
            raise UsageError(_NO_LOSS.format("This call"))

        return no_loss
    per_sample = as_per_sample(loss_fn)
    looked: set[bool] = set()

    def watched(outputs: Any, targets: Any) -> Tensor:
        losses = per_sample(outputs, targets)
        if torch.compiler.is_dynamo_compiling():  # a step is recorded after an ordinary call only, which has looked
            return losses
        # Where operations are followed or transformed, tensors that are no parameters may stand for others.
        followed = _is_followed() or _is_transformed(losses)
        if followed not in looked and isinstance(losses, Tensor):
            with torch._C.DisableTorchFunction():
                if (ordinary := _ordinary(losses)).grad_fn is not None:
                    looked.add(followed)
                    if found := _own_leaves(ordinary, outputs, targets, model, parameters_only=followed):
                        looked.update({True, False})
                        _warn_of(found, loss_fn)
        return losses

    return watched


def _is_followed() -> bool:
    """Whether a mode is active that does more than choose the device of new tensors."""
    return any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def _is_transformed(losses: Any) -> bool:
    """Whether a transform of `torch.func` (vmap, grad) runs the loss."""
    return isinstance(losses, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(losses)


def _ordinary(losses: Tensor) -> Tensor:
    """The losses as autograd sees them outside of transforms of `torch.func`."""
    while _is_transformed(losses):
        losses = torch._C._functorch.get_unwrapped(losses)
    return losses


def _own_leaves(losses: Tensor, outputs: Any, targets: Any, model: nn.Module, *, parameters_only: bool) -> list[Tensor]:
    """Return the trainable leaves of the graph between the outputs and the losses."""
    stop = {t.grad_fn for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.grad_fn is not None}
    given = {id(t) for t in (*tree_leaves((outputs, targets)), *model.parameters()) if isinstance(t, Tensor)}
    if any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(targets)):
        parameters_only = True  # a leaf without the name of a parameter may be what the targets were made of
    leaves = variables_of(nodes_from([losses.grad_fn], stop=stop))
    return [
        leaf for leaf in leaves if id(leaf) not in given and (isinstance(leaf, nn.Parameter) or not parameters_only)
    ]


def _warn_of(found: list[Tensor], loss_fn: Callable[[Any, Any], Any]) -> None:
    names = {id(p): name for name, p in loss_fn.named_parameters()} if isinstance(loss_fn, nn.Module) else {}
    first = found[0]
    what = repr(names[id(first)]) if id(first) in names else f"a tensor of shape {tuple(first.shape)}"
    more = f" and {len(found) - 1} others" if len(found) > 1 else ""
    warn(
        f"The loss depends on {what}{more}, which requires a gradient but is no parameter of the model: observe() "
        "neither trains it nor gives it a gradient. Make it a parameter of the model and return what the loss needs "
        "from forward(), for each sample; or, if it is a constant, call requires_grad_(False) on it.",
        UntrainedLossWarning,
    )
