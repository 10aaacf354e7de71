"""The whole state of a model, of its inputs and of PyTorch's global switches, to see that a call leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import _len_torch_function_stack  # type: ignore[attr-defined]
from torch.utils import _pytree as pytree


class _Identity:
    """Equal only to another one of the very same object, which it keeps alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        return f"<{type(self.value).__name__} at {id(self.value):#x}>"


@contextmanager
def no_trace(model: nn.Module, *trees: Any, but_buffers: bool = False) -> Iterator[None]:
    """Assert that what happens inside changes nothing: neither `model`, nor the tensors in `trees`, nor a global state.

    Args:
        model: compared byte for byte: values, gradients, attributes, hooks, flags, the order of everything.
        *trees: inputs and targets.
        but_buffers: let the buffers of `model` change, as a forward pass may.
    """
    before = _state(model, trees, but_buffers)
    try:
        yield
    finally:
        after = _state(model, trees, but_buffers)
        changed = {
            key: (before.get(key), after.get(key)) for key in before | after if before.get(key) != after.get(key)
        }
        assert not changed, f"a trace is left: {changed}"
        assert list(before) == list(after), "the order of modules, parameters or attributes has changed"


def _state(model: nn.Module, trees: Any, but_buffers: bool) -> dict[str, Any]:
    state: dict[str, Any] = {"keys": list(model.state_dict())}
    for path, module in model.named_modules(remove_duplicate=False):
        state[f"module {path}"] = (_Identity(module), _Identity(type(module)), module.training)
        for name, value in vars(module).items():
            if but_buffers and name == "_buffers":
                continue
            entries = [(key, _Identity(entry)) for key, entry in value.items()] if isinstance(value, dict) else None
            state[f"module {path}: {name}"] = (_Identity(value), entries)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        state[f"parameter {name}"] = _tensor_state(parameter)
    for name, buffer in () if but_buffers else model.named_buffers(remove_duplicate=False):
        state[f"buffer {name}"] = _tensor_state(buffer)
    for place, leaf in enumerate(pytree.tree_leaves(trees)):
        state[f"leaf {place}"] = _tensor_state(leaf) if isinstance(leaf, Tensor) else leaf
    state["global"] = (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        _len_torch_function_stack(),
        [
            len(hooks)
            for name, hooks in vars(nn.modules.module).items()
            if name.startswith("_global_") and "hooks" in name
        ],
    )
    return state


def _tensor_state(tensor: Tensor) -> tuple[Any, ...]:
    return (
        _Identity(tensor),
        _bytes(tensor),
        None if is_lazy(tensor) else tensor.data_ptr(),
        tensor.requires_grad,
        _Identity(tensor.grad if tensor.is_leaf else None),
        None if not tensor.is_leaf or tensor.grad is None else _bytes(tensor.grad),
        [(key, _Identity(value)) for key, value in vars(tensor).items()],
        [_Identity(hook) for hook in (tensor._backward_hooks or {}).values()],
        [_Identity(hook) for hook in (getattr(tensor, "_post_accumulate_grad_hooks", None) or {}).values()],
    )


def _bytes(value: Any) -> Any:
    if not isinstance(value, Tensor) or is_lazy(value):
        return type(value)
    value = value.detach()
    value = value.to_dense() if value.is_sparse else value
    return (
        value.dtype,
        tuple(value.shape),
        value.cpu().clone().contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
    )
