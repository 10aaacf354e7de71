"""Calls for which it is not tried to record a step, or to replay one."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree as pytree
from torch.utils._device import DeviceContext

from persample.sources.backends.fused.tracked import saved_tensors_are_intercepted
from persample.sources.batch import Batch
from persample.sources.model.eager import compiling_is_off
from persample.sources.model.modules import modules_of

# Older ones miss a variable of a closure that has changed, say, and the old step would go on to serve.
OLDEST_PYTORCH = "2.13"
DYNAMO_SEES_CHANGES = torch.__version__ >= OLDEST_PYTORCH


def why_untried(model: nn.Module, batch: Batch, tensors: Sequence[Tensor]) -> str:
    """Return why a call goes the ordinary way whatever was recorded; empty if it need not.

    Args:
        model: the network.
        batch: what it is called with.
        tensors: those of the batch.
    """
    if not DYNAMO_SEES_CHANGES:
        return f"PyTorch {torch.__version__} does not see all that may change between calls: {OLDEST_PYTORCH} does"
    if batch.split_tree is not None:
        return "the samples are not in dim 0 of all tensors of the batch"
    if any(type(t) is not Tensor or t.requires_grad or t.layout is not torch.strided for t in tensors):
        return "a tensor of the batch requires a gradient, or is of a special kind"
    if (
        any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or saved_tensors_are_intercepted()
    ):
        return "a mode of PyTorch is active (one of your own, a transform, hooks on saved tensors)"
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return "it is captured in a CUDA graph of your own"
    if compiling_is_off():
        return "PyTorch is told to compile nothing"
    if torch.is_anomaly_enabled():
        return "autograd looks for anomalies"
    if _is_watched():
        return "a debugger or another tracer looks at the model"
    if nn.modules.module._has_any_global_hook():
        return "there are hooks on all modules"
    if any(module._backward_hooks or module._backward_pre_hooks for module in modules_of(model)):
        return "a module has backward hooks"
    return ""


def _is_watched() -> bool:
    """Whether a debugger, say, wants to see the lines of the model that are run."""
    monitoring = getattr(sys, "monitoring", None)
    return sys.gettrace() is not None or (monitoring is not None and monitoring.get_tool(0) is not None)


def tensors_of(batch: Batch) -> list[Tensor]:
    """Return the tensors among the arguments and the targets."""
    leaves = pytree.tree_leaves((batch.args, dict(batch.kwargs), batch.targets))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
