"""Refusing, before anything is computed, what has no per-sample gradient with any backend."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from persample.errors import UnsupportedModelError
from persample.sources.model.modules import modules_of

#: The advice of `fused`, for models that it does not serve.
VMAP_OR_VJP = "use backend 'vmap', or 'vjp', which serves what torch.func cannot run"

#: The advice of backends that serve fewer models than `fused`.
FUSED_OR_VJP = "use backend 'fused', or 'vjp', which serves every model"


def mixing(what: str) -> UnsupportedModelError:
    """Return the refusal of a model or loss that mixes the samples.

    Args:
        what: a sentence without its full stop that says how it shows.
    """
    return UnsupportedModelError(
        f"{what}: the model or the loss mixes the samples (statistics over the batch, a softmax over dim 0, a division "
        "by the batch size, an inner layout that is not batch-first), so the gradient of a single sample does not "
        "exist. Make every sample's loss depend on that sample alone."
    )


def refuse_impossible(model: nn.Module) -> None:
    """Raise if a module of `model`, in its current mode, mixes the samples or rewrites its own parameters.

    Raises:
        UnsupportedModelError: it names the module, the reason, and what to do.
    """
    for _, reason in impossible_modules(model):
        raise UnsupportedModelError(reason)


def impossible_modules(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the path of each module of `model` that no backend can serve, and the reason with what to do."""
    modules = modules_of(model)
    for module, path in modules.items():
        reason = _reason(module) if isinstance(module, _CONDITIONAL) else None
        if reason:
            yield path, f"{describe(path, module)} {reason}"
    for module, path in modules.items():
        for kind, tensors in (("Parameter", module._parameters), ("Buffer", module._buffers)):
            for own, tensor in tensors.items():
                reason = _reason_of_tensor(kind, tensor) if tensor is not None else None
                if reason:
                    name = f"{path}.{own}" if path else own
                    yield path, f"{kind} {name!r} {reason}"


def refuse_hooked_parameters(model: nn.Module, instead: str = "use backend 'vjp' or 'loop'") -> None:
    """Raise if a hook may change the gradient of a parameter after autograd has computed it.

    Args:
        model: the network.
        instead: what gives the hook the gradient of each sample.

    Raises:
        UnsupportedModelError: it names the parameter.
    """
    for module, path in modules_of(model).items():
        for own, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and parameter._backward_hooks:
                raise hooked_parameter(f"{path}.{own}" if path else own, instead)


def hooked_parameter(name: str, instead: str = "use backend 'vjp' or 'loop'") -> UnsupportedModelError:
    """Return the refusal of a parameter that has a hook."""
    return UnsupportedModelError(
        f"Parameter {name!r} has a hook (Tensor.register_hook) that may change its gradient, but this backend does "
        f"not run it: remove the hook, or {instead}, which passes it the gradient of each sample."
    )


def describe(path: str, module: nn.Module) -> str:
    """Return how errors name a module: its class and its path in the model."""
    return f"{type(module).__name__} {path!r}" if path else f"The model ({type(module).__name__})"


def foreign_parameters(module: nn.Module) -> str | None:
    """Return why `module` does not hold just the weight and the bias of its class; None if it does."""
    if foreign := sorted(module._parameters.keys() - {"weight", "bias"}):
        return (
            f"has parameters that its class does not have ({', '.join(foreign)}), added by hand or by weight_norm, "
            "spectral_norm or pruning"
        )
    replaced = [name for name in ("weight", "bias") if name not in module._parameters and hasattr(module, name)]
    return f"has a {replaced[0]} that is not a parameter" if replaced else None


#: What to say of a parameter that is spread over processes.
SHARDED = (
    "is part of a tensor sharded over processes (fully_shard, FullyShardedDataParallel, tensor parallelism): "
    "gradients of single samples need the whole parameters in each process. Train the model unsharded; several "
    "processes train one posterior by the process_group of persample.VOGN."
)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is one of `torch.distributed.tensor`, of which this process holds a part."""
    loaded: Any = sys.modules.get("torch.distributed.tensor")  # without it no tensor can be one of its
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def _reason_of_tensor(kind: str, tensor: Tensor) -> str | None:
    if is_lazy(tensor):
        return "is not initialised yet (a lazy module): run one forward pass of the model first."
    if tensor.is_meta:
        return "is on the meta device, where it has no values: call model.to_empty(device=...) and load its weights."
    if is_sharded(tensor):
        return SHARDED
    if kind == "Parameter" and tensor.is_complex() and tensor.requires_grad:
        return (
            "is complex, and its squared gradient is not defined: store real and imaginary parts as two real "
            "parameters."
        )
    return None


# Modules that are refused in some of their modes.
_CONDITIONAL = (_BatchNorm, nn.Embedding, nn.EmbeddingBag)


def _reason(module: nn.Module) -> str | None:
    if isinstance(module, _BatchNorm):
        if module.training:
            return (
                "is in training mode: it normalises with statistics of the whole batch, so the gradient of a single "
                "sample does not exist. Call .eval() on it to use its running statistics, or let persample.fix(model) "
                "replace it by nn.GroupNorm."
            )
        if module.running_mean is None:
            return (
                "has track_running_stats=False: it normalises with statistics of the whole batch even in eval mode, "
                "so the gradient of a single sample does not exist. Let "
                "persample.fix(model) replace it by nn.GroupNorm."
            )
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        if module.max_norm is not None:
            return (
                f"has max_norm={module.max_norm}: it rewrites its weight during the forward pass, so the gradients "
                "would belong to other weights than the model's. Set max_norm=None."
            )
        if module.scale_grad_by_freq:
            return (
                "has scale_grad_by_freq=True: it divides by how often an index occurs in the whole batch, which "
                "mixes the samples. Set scale_grad_by_freq=False."
            )
    return None
